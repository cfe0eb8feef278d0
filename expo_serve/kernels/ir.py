"""Helpers to write loops in LLVM's intermediate representation with llvmlite's builder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FunctionWriter:
    """One function that is being written.

    Args:
        ir: ``llvmlite.ir``, imported by the caller since it may be missing.
        module: where the function goes.
        name: the function's.
        result: type that it returns.
        arguments: types of its arguments.
    """

    def __init__(self, ir: Any, module: Any, name: str, result: Any, arguments: list[Any]) -> None:
        self.ir, self.module = ir, module
        self.word, self.real, self.pointer = ir.IntType(64), ir.FloatType(), ir.IntType(8).as_pointer()
        function = ir.Function(module, ir.FunctionType(result, arguments), name)
        function.attributes.add("nounwind")
        self.arguments = function.args
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))

    def number(self, value: int) -> Any:
        """A constant of 64 bits."""
        return self.ir.Constant(self.word, value)

    def variable(self, start: Any) -> Any:
        """A place for a value that changes. LLVM makes a register of it: such places stand in the first block."""
        with self.builder.goto_entry_block():
            place = self.builder.alloca(start.type)
        self.builder.store(start, place)
        return place

    def array(self, kind: Any, size: int) -> Any:
        """Memory on the stack; a pointer to its first element."""
        with self.builder.goto_entry_block():
            place = self.builder.alloca(self.ir.ArrayType(kind, size))
            return self.builder.bitcast(place, kind.as_pointer())

    def at(self, start: Any, index: Any, kind: Any) -> Any:
        """The address of an element of a row of ``kind``."""
        return self.builder.gep(self.builder.bitcast(start, kind.as_pointer()), [index])

    def load(self, start: Any, index: Any, kind: Any) -> Any:
        """An element of a row of ``kind``, wherever it lies."""
        return self.builder.load(self.at(start, index, kind), align=1)

    def store(self, value: Any, start: Any, index: Any) -> None:
        """The other way round."""
        self.builder.store(value, self.at(start, index, value.type), align=1)

    def intrinsic(self, name: str, kind: Any, *arguments: Any) -> Any:
        """Call one of LLVM's own functions, which gives a value of this type."""
        function = self.module.globals.get(name)
        if function is None:
            signature = self.ir.FunctionType(kind, [argument.type for argument in arguments])
            function = self.ir.Function(self.module, signature, name)
        return self.builder.call(function, arguments)

    @contextmanager
    def loop(self, start: Any, end: Any, step: Any) -> Iterator[Any]:
        """``for index in range(start, end, step)``."""
        builder = self.builder
        head, body, done = (builder.append_basic_block() for _ in range(3))
        before = builder.block
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(start.type)
        index.add_incoming(start, before)
        builder.cbranch(builder.icmp_unsigned("<", index, end), body, done)
        builder.position_at_end(body)
        yield index
        index.add_incoming(builder.add(index, step), builder.block)
        builder.branch(head)
        builder.position_at_end(done)
