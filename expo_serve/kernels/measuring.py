"""What two bf16 tensors differ by, and how much of a step arrives after rounding: counts and sums of one pass.

Sums are kept in fp32 over a chunk, and in fp64 over all of them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from expo_serve.kernels.bf16 import Bits, fma, round_bits, round_dithered, widen
from expo_serve.kernels.compiling import helper, loop
from expo_serve.kernels.dither import CHUNK, chunk_of, fill_chunk
from expo_serve.kernels.reading import pread

Counts = npt.NDArray[np.int64]
Sums = npt.NDArray[np.float64]


@helper
def _rank(bits: np.uint16) -> np.int16:
    """Return the position of a bf16 in the order of the numbers; 0.0 and -0.0 have one."""
    size, sign = np.int16(bits & np.uint16(0x7FFF)), np.int16(np.int16(bits) >> np.int16(15))
    return np.int16(np.int16(size ^ sign) - sign)


@helper
def _count(base: Bits, aligned: Bits, counts: Counts) -> None:
    """Count the values of a chunk, all in 16 bits: its number of values fits, and so does a distance without sign."""
    same = one = two = four = np.uint16(0)
    for i in range(base.size):
        first, second = _rank(base[i]), _rank(aligned[i])
        away = np.uint16(np.int16(max(first, second) - min(first, second)))
        same = np.uint16(same + np.uint16(away == np.uint16(0)))
        one = np.uint16(one + np.uint16(away == np.uint16(1)))
        two = np.uint16(two + np.uint16(away == np.uint16(2)))
        four = np.uint16(four + np.uint16(np.uint16(away - np.uint16(3)) < np.uint16(2)))
    counts[0] += same
    counts[1] += one
    counts[2] += two
    counts[3] += four
    counts[4] += base.size - same - one - two - four


@helper
def _add_nearest(base: Bits, aligned: Bits, factor: float, from_aligned: bool, sums: Sums) -> None:
    size = step_size = moved = np.float32(0)
    for i in range(base.size):
        start, end = widen(base[i]), widen(aligned[i])
        step = end - start
        value = fma(factor, step, end if from_aligned else start)
        size += end * end
        step_size += step * step
        moved += (widen(round_bits(value)) - end) * step
    sums[0] += size
    sums[1] += step_size
    sums[2] += moved


@helper
def _add_both(base: Bits, aligned: Bits, factor: float, from_aligned: bool, noise: Bits, sums: Sums) -> None:
    size = step_size = moved = moved_dithered = np.float32(0)
    for i in range(base.size):
        start, end = widen(base[i]), widen(aligned[i])
        step = end - start
        value = fma(factor, step, end if from_aligned else start)
        size += end * end
        step_size += step * step
        moved += (widen(round_bits(value)) - end) * step
        moved_dithered += (widen(round_dithered(value, noise[i])) - end) * step
    sums[0] += size
    sums[1] += step_size
    sums[2] += moved
    sums[3] += moved_dithered


@loop("void(uint16[::1], uint16[::1], float32, boolean, uint16[::1], int64[::1], float64[::1])", sums=True)
def tally(
    base: Bits, aligned: Bits, factor: float, from_aligned: bool, noise: Bits, counts: Counts, sums: Sums
) -> None:
    """Add to counts and sums.

    Args:
        base: values of the base tensor.
        aligned: as many of the aligned tensor.
        factor: see :func:`~expo_serve.kernels.bf16.lerp_factor`.
        from_aligned: the same.
        noise: the random bits of each value; empty leaves out what dithered rounding gives.
        counts: values that are 0, 1, 2, 3 or 4, and more units in the last place from base's.
        sums: of the squares of aligned and of the step; of the products of the step and what the result differs from
            aligned by, rounded to nearest and dithered.
    """
    for first in range(0, base.size, CHUNK):
        one, two = base[first : first + CHUNK], aligned[first : first + CHUNK]
        _count(one, two, counts)
        if noise.size:
            _add_both(one, two, factor, from_aligned, noise[first : first + CHUNK], sums)
        else:
            _add_nearest(one, two, factor, from_aligned, sums)


@loop(
    "int64(int32, int64, int32, int64, uint16[::1], uint16[::1], int64, float32, boolean, uint64, int64, int64[::1], "
    "float64[::1])",
    sums=True,
)
def stream(
    base_file: int,
    base_offset: int,
    aligned_file: int,
    aligned_offset: int,
    base: Bits,
    aligned: Bits,
    size: int,
    factor: float,
    from_aligned: bool,
    key: int,
    index: int,
    counts: Counts,
    sums: Sums,
) -> int:
    """Read both sides from their files and add to counts and sums, as much at a time as their memory holds.

    Args:
        base_file: descriptor of the file of base.
        base_offset: where its first byte is.
        aligned_file: descriptor of the file of aligned.
        aligned_offset: where its first byte is.
        base: memory for a piece of base.
        aligned: memory for a piece of aligned, as large.
        size: number of values.
        factor: see :func:`tally`, as for those that follow.
        from_aligned: the same.
        key: the tensor's key for dithered rounding.
        index: the element of the tensor that the first value is.
        counts: see :func:`tally`.
        sums: the same.

    Returns:
        How many values are counted: fewer than ``size`` if a read returned less than was asked for.
    """
    words = np.empty(CHUNK // 2 + 1, np.uint32)
    done = 0
    while done < size:
        count = min(base.size, size - done)
        if pread(base_file, base.ctypes.data, 2 * count, base_offset + 2 * done) != 2 * count:
            break
        if pread(aligned_file, aligned.ctypes.data, 2 * count, aligned_offset + 2 * done) != 2 * count:
            break
        start = 0
        while start < count:
            part = chunk_of(index + done + start, count - start)
            noise = fill_chunk(words, np.uint64(key), index + done + start, part)
            one, two = base[start : start + part], aligned[start : start + part]
            _count(one, two, counts)
            _add_both(one, two, factor, from_aligned, noise, sums)
            start += part
        done += count
    return done
