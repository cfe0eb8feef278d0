"""The machine code of the hot loops: vectors where they must be.

numba compiles a loop that it cannot make vectors of without a word, and such a loop takes up to nine times as long: an
accumulator that it widens (``seen |= value``), ``for value in array``, an index that might be negative.
"""

from __future__ import annotations

import inspect
import platform
import re
from collections.abc import Callable

import numba
import pytest

from expo_serve.kernels import bf16, compiling, low_rank, reading, sparse

FMA = r"fmla\s+v\d+\.4s" if platform.machine() == "aarch64" else r"vfmadd\w+ps\s.*[yz]mm"
"""A fused multiply-add of a vector of fp32 values."""
Loop = Callable[..., object]


def compiled(loop: Loop, *change: str) -> tuple[str, str]:
    """Compile a loop anew, without the cache, with a line of its source changed where one is given.

    Returns:
        LLVM's instructions after all optimisations, and the machine code.
    """
    function = loop.py_func  # type: ignore[attr-defined]
    if change:
        source = inspect.getsource(function)
        assert change[0] in source
        namespace = dict(function.__globals__)
        exec(source[source.index("def ") :].replace(change[0], change[1]), namespace)
        function = namespace[source[source.index("def ") + 4 : source.index("(", source.index("def "))]]
    made = numba.njit(**compiling._OPTIONS)(function)
    made.compile(compiling._signatures[loop])
    (llvm,), (machine,) = made.inspect_llvm().values(), made.inspect_asm().values()
    return llvm, machine


def accumulators(llvm: str) -> set[str]:
    """Find the types of the vectors that are carried from one turn of a loop to the next."""
    return set(re.findall(r"= phi <\d+ x (\w+)>", llvm))


@pytest.mark.parametrize(
    "loop", [bf16.combine, reading.stream, sparse.extrapolate, low_rank.stream], ids=lambda loop: str(loop.__module__)
)
def test_formula_is_computed_in_vectors_and_marks_are_joined_in_narrow_words(loop: Loop) -> None:
    llvm, machine = compiled(loop)
    assert len(re.findall(FMA, machine)) >= 2
    found = accumulators(llvm)
    counts = {"i8", "i64"} if loop is sparse.extrapolate else set()  # of the changes, where they are checked first
    joined = {bf16.combine: {"i16", "i32"}, reading.stream: {"i32"}}.get(loop, {"i16"})  # i32: marks of two values
    assert joined <= found
    hashed = set() if loop is bf16.combine else {"i32"}  # the counters that random bits come from
    assert found <= joined | {"float"} | counts | hashed


def test_product_is_computed_in_vectors() -> None:
    assert len(re.findall(FMA, compiled(low_rank.product)[1])) >= low_rank._ROWS


def test_trap_would_be_seen() -> None:
    """The tests above can fail: the loop as it would be with a wide accumulator."""
    llvm, machine = compiled(bf16.combine, "seen = np.uint16(seen | mark(result))", "seen |= mark(result)")
    assert accumulators(llvm) == {"i64", "i32"}
    assert len(re.findall(FMA, machine)) < len(re.findall(FMA, compiled(bf16.combine)[1]))
