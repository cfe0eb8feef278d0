"""What two bf16 tensors differ by, and how much of a step arrives after rounding: counts and sums of one pass."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from expo_serve.kernels.bf16 import Bits, fma, round_bits, round_dithered, widen
from expo_serve.kernels.compiling import helper, loop

Counts = npt.NDArray[np.int64]
Sums = npt.NDArray[np.float64]
CHUNK = 4096
"""Values whose sums are kept in fp32."""


@helper
def _rank(bits: np.uint16) -> np.int32:
    """Return the position of a bf16 in the order of the numbers; 0.0 and -0.0 have one."""
    size, sign = np.int32(bits & np.uint16(0x7FFF)), np.int32(np.int32(np.int16(bits)) >> np.int32(15))
    return np.int32(np.int32(size ^ sign) - sign)


@helper
def _count(base: Bits, aligned: Bits, counts: Counts) -> None:
    same = one = two = four = np.int32(0)
    for i in range(base.size):
        difference = np.int32(_rank(base[i]) - _rank(aligned[i]))
        away = max(difference, np.int32(-difference))
        same = np.int32(same + np.int32(away == np.int32(0)))
        one = np.int32(one + np.int32(away == np.int32(1)))
        two = np.int32(two + np.int32(away == np.int32(2)))
        four = np.int32(four + np.int32(np.uint32(away - np.int32(3)) < np.uint32(2)))
    counts[0] += same
    counts[1] += one
    counts[2] += two
    counts[3] += four
    counts[4] += base.size - same - one - two - four


@helper
def _add_steps(base: Bits, aligned: Bits, factor: float, from_aligned: bool, sums: Sums) -> None:
    size = step_size = moved = np.float32(0)
    for i in range(base.size):
        start, end = widen(base[i]), widen(aligned[i])
        step = end - start
        value = widen(round_bits(fma(factor, step, end if from_aligned else start)))
        size += end * end
        step_size += step * step
        moved += (value - end) * step
    sums[0] += size
    sums[1] += step_size
    sums[2] += moved


@helper
def _add_dithered(base: Bits, aligned: Bits, factor: float, from_aligned: bool, noise: Bits, sums: Sums) -> None:
    moved = np.float32(0)
    for i in range(base.size):
        start, end = widen(base[i]), widen(aligned[i])
        step = end - start
        value = widen(round_dithered(fma(factor, step, end if from_aligned else start), noise[i]))
        moved += (value - end) * step
    sums[3] += moved


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
        _add_steps(one, two, factor, from_aligned, sums)
        if noise.size:
            _add_dithered(one, two, factor, from_aligned, noise[first : first + CHUNK], sums)
