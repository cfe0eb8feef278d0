"""Stores that bypass the cache: a parameter is written once, and not read before the load is over.

An ordinary store reads the line of the cache that it writes to from memory first, and pushes out another one. A
non-temporal store does neither where whole lines are written, so results are collected in the L1 cache and copied
from there, line by line. Whether that is faster depends on the processor and on how the operands are read:
docs/performance.md#ways has figures, and :mod:`expo_serve.load.ways` measures it during the load.
"""

from __future__ import annotations

from llvmlite import ir as llvm
from numba import types

from expo_serve.kernels.bf16 import Bits
from expo_serve.kernels.compiling import Intrinsic, helper, intrinsic

LINE_BYTES = 64
_VECTOR_BYTES = 32


@intrinsic(int)
def _store_line(typing: object, to: object, source: object) -> Intrinsic:
    """Copy a line from one address to another, which is aligned to it; return 0."""
    return types.intp(types.intp, types.intp), _write_line


def _write_line(context, builder, signature, values):  # type: ignore[no-untyped-def]  # numba's and LLVM's objects
    to, source = values
    vector = llvm.VectorType(llvm.IntType(64), _VECTOR_BYTES // 8)
    hint = builder.module.add_metadata([llvm.Constant(llvm.IntType(32), 1)])
    for offset in range(0, LINE_BYTES, _VECTOR_BYTES):
        place = builder.inttoptr(builder.add(source, source.type(offset)), vector.as_pointer())
        line = builder.load(place, align=2)
        place = builder.inttoptr(builder.add(to, to.type(offset)), vector.as_pointer())
        builder.store(line, place, align=_VECTOR_BYTES).set_metadata("nontemporal", hint)
    return to.type(0)


@intrinsic(int)
def fence(typing: object) -> Intrinsic:
    """Order the stores so far before those that follow, which tell other threads of them; return 0."""
    return types.intp(), _write_fence


def _write_fence(context, builder, signature, values):  # type: ignore[no-untyped-def]  # numba's and LLVM's objects
    builder.fence("seq_cst")
    return context.get_constant(types.intp, 0)


@helper
def _copy(source: Bits, to: Bits) -> None:
    for i in range(to.size):  # over a part, an index would be looked at whether it counts from the end
        to[i] = source[i]


@helper
def store(source: Bits, to: Bits) -> None:
    """Copy values past the cache; call :func:`fence` before another thread may read them.

    Args:
        source: values in the cache.
        to: memory for as many.
    """
    line = LINE_BYTES // 2
    head = min(to.size, ((-to.ctypes.data) % LINE_BYTES) // 2)
    lines = (to.size - head) // line
    _copy(source[:head], to[:head])
    first, last = to.ctypes.data + 2 * head, source.ctypes.data + 2 * head
    for i in range(lines):
        _store_line(first + LINE_BYTES * i, last + LINE_BYTES * i)
    _copy(source[head + lines * line : to.size], to[head + lines * line :])
