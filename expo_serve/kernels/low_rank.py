"""The product of two thin matrices, computed where it is used: never stored whole, and added in the same pass for bf16.

Every element is one chain of fused multiply-adds over the rank, in order, whatever the tile that it is computed in: a
block, a shard or a view of the product has the bits of the whole. A library's matrix product does not promise that, and
would write the product (twice the size of what it changes) to memory and read it again.

A panel of columns of the right factor stays in the cache, a few rows at a time go through it, and their sums stay in
registers over the whole rank. The tile that does so is the one place that writes LLVM instructions itself: from a plain
loop LLVM makes code that takes two to three times as long.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from llvmlite import ir as llvm
from numba import types
from numba.core import cgutils

from expo_serve.kernels.bf16 import Bits, fma, is_unmarked, mark, round_bits, round_dithered, widen
from expo_serve.kernels.compiling import Intrinsic, has_feature, helper, intrinsic, loop
from expo_serve.kernels.dither import CHUNK, Words, chunk_of, fill_chunk
from expo_serve.kernels.reading import pread

Matrix = npt.NDArray[np.float32]
Singles = npt.NDArray[np.float32]
Rows = npt.NDArray[np.uint16]
"""Whole rows of a bf16 matrix, as unsigned integers of two dimensions."""

# As many sums as there are registers for: 16 of 64 bytes, or 8 of 32.
_ROWS, _LANES = (8, 32) if has_feature("avx512f") else (4, 16)
_PANEL = 512
"""Columns: at rank 16 the panel of the right factor takes 32 KiB."""


def _tile(rows: int, lanes: int) -> Callable[..., int]:
    """Make an intrinsic that computes ``rows`` by ``lanes`` elements of a product of fp32 matrices.

    Its arguments are the address of the first row of the left factor, the rank, the address of the first column of the
    right factor, the elements between two rows of that, and where the sums go, with :data:`_PANEL` elements between
    two rows of them. It returns 0.
    """

    @intrinsic(int)
    def tile(typing: object, left: object, rank: object, right: object, stride: object, sums: object) -> Intrinsic:
        word = types.intp
        return word(word, word, word, word, word), lambda context, builder, signature, values: _write_tile(
            builder, values, rows, lanes
        )

    return tile


def _write_tile(builder: llvm.IRBuilder, values: list[llvm.Value], rows: int, lanes: int) -> llvm.Value:
    """Write the tile's instructions: one vector of sums for each row, kept in registers over the rank."""
    left, rank, right, stride, sums = values
    single, vector = llvm.FloatType(), llvm.VectorType(llvm.FloatType(), lanes)
    positions = llvm.Constant(llvm.VectorType(llvm.IntType(32), lanes), [0] * lanes)
    fused = cgutils.get_or_insert_function(
        builder.module, llvm.FunctionType(vector, [vector] * 3), f"llvm.fma.v{lanes}f32"
    )

    def address(start: llvm.Value, index: llvm.Value, kind: llvm.Type) -> llvm.Value:
        """Find an fp32 element, and take what is there to be of this type."""
        return builder.inttoptr(builder.add(start, builder.mul(index, rank.type(4))), kind.as_pointer())

    totals = [cgutils.alloca_once_value(builder, vector([0.0] * lanes)) for _ in range(rows)]
    with cgutils.for_range(builder, rank) as loop:
        columns = builder.load(address(right, builder.mul(loop.index, stride), vector), align=4)
        for row, total in enumerate(totals):
            index = builder.add(builder.mul(rank, rank.type(row)), loop.index)
            one = builder.insert_element(
                vector(llvm.Undefined), builder.load(address(left, index, single)), positions.type.element(0)
            )
            factor = builder.shuffle_vector(one, one, positions)
            builder.store(builder.call(fused, (factor, columns, builder.load(total))), total)
    for row, total in enumerate(totals):
        builder.store(builder.load(total), address(sums, rank.type(row * _PANEL), vector), align=4)
    return rank.type(0)


_full, _line, _single = _tile(_ROWS, _LANES), _tile(1, _LANES), _tile(1, 1)


@helper
def _sum(left: Matrix, right: Matrix, row: int, count: int, start: int, sums: Matrix, width: int) -> None:
    """Compute ``count`` rows of the product, 1 or :data:`_ROWS`, and ``width`` columns from ``start`` on."""
    rank, stride = left.shape[1], right.shape[1]
    first, columns, to = left.ctypes.data + 4 * row * rank, right.ctypes.data + 4 * start, sums.ctypes.data
    whole = width - width % _LANES
    for c in range(0, whole, _LANES):
        if count == _ROWS:
            _full(first, rank, columns + 4 * c, stride, to + 4 * c)
        else:
            _line(first, rank, columns + 4 * c, stride, to + 4 * c)
    for r in range(count):
        for c in range(whole, width):
            _single(first + 4 * r * rank, rank, columns + 4 * c, stride, to + 4 * (r * _PANEL + c))


@loop("void(float32[:, ::1], float32[:, ::1], int64, float32[:, ::1], float32)")
def product(left: Matrix, right: Matrix, start: int, out: Matrix, scale: float) -> None:
    """Compute ``scale * left @ right``, of some columns.

    Args:
        left: fp32, rows by rank.
        right: fp32, rank by columns.
        start: the first column that is wanted.
        out: fp32, rows by the columns that are wanted.
        scale: a factor for every element.
    """
    rows, width = out.shape
    sums = np.empty((_ROWS, _PANEL), np.float32)
    for panel in range(0, width, _PANEL):
        end = min(panel + _PANEL, width)
        row = 0
        while row < rows:
            count = _ROWS if row + _ROWS <= rows else 1
            _sum(left, right, row, count, start + panel, sums, end - panel)
            for r in range(count):
                line, found = out[row + r, panel:end], sums[r, : end - panel]
                for c in range(line.size):
                    line[c] = found[c] * scale
            row += count


@helper
def _add_line(line: Bits, product: Singles, scale: float, factor: float) -> np.uint16:
    """Add to a part of a row, rounded to nearest; return the joined marks of the results."""
    seen = np.uint16(0)
    for c in range(line.size):
        result = round_bits(fma(factor, product[c] * scale, widen(line[c])))
        line[c] = result
        seen = np.uint16(seen | mark(result))
    return seen


@helper
def _add_line_dithered(
    line: Bits, product: Singles, scale: float, factor: float, key: int, index: int, words: Words
) -> np.uint16:
    """Do the same, rounded dithered; ``index`` is that of the line's first element, ``words`` scratch memory."""
    seen = np.uint16(0)
    done = 0
    while done < line.size:
        count = chunk_of(index + done, line.size - done)
        noise = fill_chunk(words, np.uint64(key), index + done, count)
        part, added = line[done : done + count], product[done : done + count]
        for c in range(count):
            result = round_dithered(fma(factor, added[c] * scale, widen(part[c])), noise[c])
            part[c] = result
            seen = np.uint16(seen | mark(result))
        done += count
    return seen


@helper
def _add(
    left: Matrix, right: Matrix, values: Rows, scale: float, factor: float, is_dithered: bool, key: int, index: int
) -> bool:
    """Add ``factor * (scale * left @ right)`` in place; return True if every result is finite."""
    rows, width = values.shape
    sums, words = np.empty((_ROWS, _PANEL), np.float32), np.empty(CHUNK // 2 + 1, np.uint32)
    seen = np.uint16(0)
    for panel in range(0, width, _PANEL):
        end = min(panel + _PANEL, width)
        row = 0
        while row < rows:
            count = _ROWS if row + _ROWS <= rows else 1
            _sum(left, right, row, count, panel, sums, end - panel)
            for r in range(row, row + count):
                line, found = values[r, panel:end], sums[r - row, : end - panel]
                if is_dithered:
                    place = index + r * width + panel
                    found_seen = _add_line_dithered(line, found, scale, factor, key, place, words)
                else:
                    found_seen = _add_line(line, found, scale, factor)
                seen = np.uint16(seen | found_seen)
            row += count
    return is_unmarked(seen)


@loop(
    "int64(int32, int64, float32[:, ::1], float32[:, ::1], uint16[:, ::1], float32, float32, int64, boolean, uint64, "
    "int64)"
)
def stream(
    file: int, offset: int, left: Matrix, right: Matrix, values: Rows, scale: float, factor: float, step: int,
    is_dithered: bool, key: int, index: int,
) -> int:  # fmt: skip
    """Read whole rows of bf16 to where they belong, and add ``factor * (scale * left @ right)`` there, rounded once.

    Args:
        file: descriptor of the file of base.
        offset: where in it the first row begins.
        left: fp32, rows by rank.
        right: fp32, rank by columns.
        values: bf16, rows by columns: where base is read to, and the result.
        scale: a factor for every element of the product.
        factor: 1 + alpha.
        step: rows to read before the product is added to them.
        is_dithered: whether to round dithered.
        key: the tensor's key, for that.
        index: the element of the tensor that the first value is, for that.

    Returns:
        How many rows are done: fewer than there are if a read returned less than was asked for, or a result is not
        finite.
    """
    rows, columns = values.shape
    done = 0
    while done < rows:
        end = min(done + step, rows)
        part = values[done:end]
        size = 2 * (end - done) * columns
        if pread(file, part.ctypes.data, size, offset + 2 * done * columns) != size:
            break
        place = index + done * columns
        if not _add(left[done:end], right, part, scale, factor, is_dithered, key, place):
            break
        done = end
    return done
