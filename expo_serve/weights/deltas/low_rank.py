"""The product of two thin matrices, computed where it is used: never whole, and added in the same pass for bf16.

Every element is one chain of fused multiply-adds over the rank, in order, whatever the tile that it is computed in: a
block, a shard or a view of the product has the bits of the whole. A library's matrix product does not promise that, and
would write the product (twice the size of what it changes) to memory and read it again.

The loop: a panel of columns of the right factor stays near the core, a few rows at a time go through it, and their sums
stay in registers over the whole rank. One core of an AMD EPYC with AVX-512 does 70 GFLOP/s at rank 16 and 50 at rank 8,
addition included; torch's product alone did 14 to 64 there, by shape.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from expo_serve.weights.native import compiled, once

_PANEL = 512
"""Columns: at rank 16 the panel takes 32 KB."""

_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURE = ctypes.CFUNCTYPE(ctypes.c_bool, *(_POINTER, _SIZE) * 4, *(_SIZE,) * 3, _FLOAT, _FLOAT)


@dataclass(frozen=True)
class Factors:
    """``scale * left @ right``. fp32, contiguous: left is rows by rank, right rank by columns."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float

    @property
    def columns(self) -> int:
        """Of the product."""
        return self.right.shape[1]

    def product(self, rows: range, columns: range, out: torch.Tensor) -> None:
        """A part of the product.

        Args:
            rows: which.
            columns: which.
            out: fp32, contiguous, of these sizes.
        """
        shape = len(rows), len(columns)
        if loops := low_rank():
            loops.product(self._left(rows), self._right(columns), self._sizes(shape), self.scale, out)
            return
        left, right = self.left[rows.start : rows.stop].double(), self.right[:, columns.start : columns.stop].double()
        out.view(shape).copy_((left @ right).float() * self.scale)

    def add(self, rows: range, columns: range, values: torch.Tensor, weight: float) -> bool:
        """Add ``weight`` times a part of the product to bf16 values in place; says whether all of them are finite.

        Args:
            rows: which.
            columns: which.
            values: bf16, of these sizes, contiguous rows.
            weight: 1 + alpha.
        """
        loops = low_rank()
        assert loops is not None
        sizes = self._sizes((len(rows), len(columns)))
        return loops.add(self._left(rows), self._right(columns), sizes, (self.scale, weight), values)

    def _left(self, rows: range) -> tuple[int, int]:
        rank = self.left.shape[1]
        return self.left.data_ptr() + 4 * rows.start * rank, rank

    def _right(self, columns: range) -> tuple[int, int]:
        return self.right.data_ptr() + 4 * columns.start, self.columns

    def _sizes(self, shape: tuple[int, int]) -> tuple[int, int, int]:
        return (*shape, self.left.shape[1])


class LowRank:
    """The compiled loops; matrices come as an address and the elements from row to row."""

    def __init__(self, functions: dict[str, Callable[..., Any]]) -> None:
        self._add, self._product = functions["add"], functions["product"]

    def product(
        self, left: tuple[int, int], right: tuple[int, int], sizes: tuple[int, int, int], scale: float, out: torch.Tensor
    ) -> None:
        """See :meth:`Factors.product`."""
        there = out.data_ptr(), sizes[1]
        self._product(*there, *there, *left, *right, *sizes, scale, 0.0)

    def add(
        self,
        left: tuple[int, int],
        right: tuple[int, int],
        sizes: tuple[int, int, int],
        factors: tuple[float, float],
        values: torch.Tensor,
    ) -> bool:
        """See :meth:`Factors.add`."""
        there = values.data_ptr(), values.stride(0) if values.dim() > 1 else sizes[1]
        return not self._add(*there, *there, *left, *right, *sizes, *factors)


@once
def low_rank() -> LowRank | None:
    """The loops, or None where they cannot be compiled; compiled once in a process."""
    try:
        source = _source()
    except ImportError:
        return None
    functions = compiled(source, {"add": _SIGNATURE, "product": _SIGNATURE})
    return LowRank(functions) if functions else None


def _source() -> str:
    from llvmlite import binding, ir

    # As many sums as there are registers for: 16 of 64 bytes, or 8 of 32.
    lanes, rows = (32, 8) if binding.get_host_cpu_features().get("avx512f") else (16, 4)
    module = ir.Module("low_rank")
    for name in ("add", "product"):
        _Writer(ir, module, name, lanes, rows).write()
    return str(module)


class _Writer:
    """Writes one function: ``add(base, stride, out, stride, left, stride, right, stride, rows, columns, rank, scale,
    weight)``; ``product`` has the same arguments, and stores the scaled product instead of adding it to base.

    Args:
        ir: llvmlite's builder of intermediate representation.
        module: where the function goes.
        name: ``add`` (bf16 in and out) or ``product`` (fp32 out).
        lanes: columns that are computed side by side.
        rows: the same.
    """

    def __init__(self, ir: Any, module: Any, name: str, lanes: int, rows: int) -> None:
        self._ir, self._lanes, self._rows, self._adds = ir, lanes, rows, name == "add"
        self.word, self.real = ir.IntType(64), ir.FloatType()
        self.pointer = ir.IntType(8).as_pointer()
        matrices = [kind for _ in range(4) for kind in (self.pointer, self.word)]
        kinds = [*matrices, *[self.word] * 3, self.real, self.real]
        function = ir.Function(module, ir.FunctionType(ir.IntType(1), kinds), name)
        function.attributes.add("nounwind")
        self._arguments = function.args
        self._builder = ir.IRBuilder(function.append_basic_block("entry"))

    def write(self) -> None:
        """Panels of columns, blocks of rows within, vectors of columns within, the rank within."""
        builder, word = self._builder, self.word
        rows, columns = self._arguments[8], self._arguments[9]
        self._bad = {lanes: self._zeros(lanes) for lanes in (1, self._lanes)}
        zero = self._ir.Constant(word, 0)
        full_rows = builder.sub(rows, builder.urem(rows, self._number(self._rows)))
        with self._loop(zero, columns, self._number(_PANEL)) as panel:
            after = builder.add(panel, self._number(_PANEL))
            end = builder.select(builder.icmp_unsigned("<", after, columns), after, columns)
            with self._loop(zero, full_rows, self._number(self._rows)) as row:
                self._row_block(row, panel, end, self._rows)
            with self._loop(full_rows, rows, self._number(1)) as row:
                self._row_block(row, panel, end, 1)
        builder.ret(self._any_negative())

    def _row_block(self, row: Any, start: Any, end: Any, count: int) -> None:
        builder = self._builder
        lanes = self._number(self._lanes)
        whole = builder.sub(end, builder.urem(builder.sub(end, start), lanes))
        with self._loop(start, whole, lanes) as column:
            self._tile(row, column, count, self._lanes)
        with self._loop(whole, end, self._number(1)) as column:
            self._tile(row, column, count, 1)

    def _tile(self, row: Any, column: Any, count: int, lanes: int) -> None:
        """``count`` rows of ``lanes`` columns: their sums over the rank, then what becomes of them."""
        builder, ir = self._builder, self._ir
        vector = ir.VectorType(self.real, lanes)
        with builder.goto_entry_block():  # only there a place in memory becomes a register
            sums = [builder.alloca(vector) for _ in range(count)]
        for total in sums:
            builder.store(ir.Constant(vector, [0.0] * lanes), total)
        rows = [builder.add(row, self._number(index)) for index in range(count)]
        with self._loop(self._number(0), self._arguments[10], self._number(1)) as place:
            right = builder.load(self._at(6, place, column, vector), align=4)
            for index, total in zip(rows, sums, strict=True):
                left = self._spread(builder.load(self._at(4, index, place, self.real), align=4), lanes)
                builder.store(builder.call(self._fma(vector), [left, right, builder.load(total)]), total)
        scale = self._spread(self._arguments[11], lanes)
        for index, total in zip(rows, sums, strict=True):
            step = builder.fmul(builder.load(total), scale)
            if self._adds:
                self._add(step, index, column, lanes)
            else:
                builder.store(step, self._at(2, index, column, vector), align=4)

    def _add(self, step: Any, row: Any, column: Any, lanes: int) -> None:
        """``base + weight * step``, rounded to bf16 as torch does it, to the nearest with ties to even."""
        builder, ir = self._builder, self._ir
        narrow, wide = ir.VectorType(ir.IntType(16), lanes), ir.VectorType(ir.IntType(32), lanes)

        def number(kind: Any, value: int) -> Any:
            return ir.Constant(kind, [value] * lanes)

        bits = builder.zext(builder.load(self._at(0, row, column, narrow), align=2), wide)
        base = builder.bitcast(builder.shl(bits, number(wide, 16)), ir.VectorType(self.real, lanes))
        weight = self._spread(self._arguments[12], lanes)
        value = builder.call(self._fma(base.type), [weight, step, base])
        bits = builder.bitcast(value, wide)
        odd = builder.and_(builder.lshr(bits, number(wide, 16)), number(wide, 1))
        rounded = builder.add(builder.add(bits, number(wide, 0x7FFF)), odd)
        result = builder.trunc(builder.lshr(rounded, number(wide, 16)), narrow)
        builder.store(result, self._at(2, row, column, narrow), align=2)
        # See fused.py: the sum sets the sign bit for an exponent of Inf or NaN, and for no other.
        mark = builder.add(builder.and_(result, number(narrow, 0x7F80)), number(narrow, 0x80))
        seen = self._bad[lanes]
        builder.store(builder.or_(builder.load(seen), mark), seen)

    def _zeros(self, lanes: int) -> Any:
        """A place for what was seen in each lane."""
        kind = self._ir.VectorType(self._ir.IntType(16), lanes)
        place = self._builder.alloca(kind)
        self._builder.store(self._ir.Constant(kind, [0] * lanes), place)
        return place

    def _any_negative(self) -> Any:
        builder, ir = self._builder, self._ir
        found = ir.Constant(ir.IntType(16), 0)
        for lanes, place in self._bad.items():
            seen = builder.load(place)
            for lane in range(lanes):
                found = builder.or_(found, builder.extract_element(seen, ir.Constant(ir.IntType(32), lane)))
        return builder.icmp_signed("<", found, ir.Constant(ir.IntType(16), 0))

    def _at(self, matrix: int, row: Any, column: Any, kind: Any) -> Any:
        """The address of an element of a matrix, given by the place of its argument."""
        builder = self._builder
        element = kind.element if hasattr(kind, "element") else kind
        start = builder.bitcast(self._arguments[matrix], element.as_pointer())
        index = builder.add(builder.mul(row, self._arguments[matrix + 1]), column)
        return builder.bitcast(builder.gep(start, [index]), kind.as_pointer())

    def _fma(self, vector: Any) -> Any:
        """LLVM's own function for a vector of this type."""
        module, name = self._builder.module, f"llvm.fma.v{vector.count}f32"
        kind = self._ir.FunctionType(vector, [vector] * 3)
        return module.globals.get(name) or self._ir.Function(module, kind, name)

    def _spread(self, value: Any, lanes: int) -> Any:
        ir, builder = self._ir, self._builder
        vector = ir.VectorType(self.real, lanes)
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
        return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), mask)

    def _number(self, value: int) -> Any:
        return self._ir.Constant(self.word, value)

    @contextmanager
    def _loop(self, start: Any, end: Any, step: Any) -> Iterator[Any]:
        """``for index in range(start, end, step)``."""
        builder = self._builder
        head = builder.append_basic_block()
        body, done = builder.append_basic_block(), builder.append_basic_block()
        before = builder.block
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(self.word)
        index.add_incoming(start, before)
        builder.cbranch(builder.icmp_unsigned("<", index, end), body, done)
        builder.position_at_end(body)
        yield index
        index.add_incoming(builder.add(index, step), builder.block)
        builder.branch(head)
        builder.position_at_end(done)
