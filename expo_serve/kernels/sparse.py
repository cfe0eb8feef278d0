"""The changes of a block of a packed delta, applied to base's values: the cost grows with the changes.

For bf16 a loop also extrapolates. Where nothing changed, both operands are base and lerp gives base itself, so that a
look at all values, at the speed of the cache, is all that most of them cost.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from expo_serve.kernels.bf16 import fma, is_unmarked, mark, round_bits, round_dithered, widen
from expo_serve.kernels.codes import LARGE, SKIP
from expo_serve.kernels.compiling import helper, loop
from expo_serve.kernels.dither import key_of, noise_of

Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.int16]
Values = TypeVar("Values", Halves, npt.NDArray[np.int32], npt.NDArray[np.int64])
Integer = TypeVar("Integer", np.int16, np.int32, np.int64)
Places = npt.NDArray[np.uint32]
_CHUNK = 4096
"""Gaps at a time, where arithmetic is done in vectors: what is computed from them stays in the L1 cache."""
_MINUS_ZERO = np.int16(-(2**15))


@helper
def _fits(gaps: Bytes, small: Bytes, large: int, values: int) -> bool:
    """Return True if the parts fit each other and so many values: no walk leaves them then."""
    count = place = escapes = 0
    for i in range(gaps.size):
        is_change = gaps[i] != SKIP
        count += is_change
        place += gaps[i] + is_change
    for i in range(small.size):
        escapes += small[i] == LARGE
    return count == small.size and escapes == large and place <= values


@helper
def _moved(old: Integer, step: Integer, top: Integer, largest: Integer) -> Integer:
    """Move a value's rank by a zigzag-coded step: 0, 1, 2, 3 are 0, -1, 1, -2.

    The rank is the bits as a signed integer in the order of the floating-point numbers. ``top`` is the number of the
    uppermost bit, ``largest`` the largest integer.
    """
    kind, one = type(old), type(old)(1)
    difference = kind(kind(kind(step >> one) & largest) ^ kind(-kind(step & one)))
    rank = kind(kind(old ^ kind(kind(old >> top) & largest)) + difference)
    return kind(rank ^ kind(kind(rank >> top) & largest))


def _apply(gaps: Bytes, small: Bytes, large: Values, values: Values) -> bool:
    """Change values in place.

    Args:
        gaps: how many values are between two changes; 255 is :data:`~expo_serve.kernels.codes.SKIP`.
        small: the step of each change less one; 255 is :data:`~expo_serve.kernels.codes.LARGE`.
        large: the steps that do not fit in a byte.
        values: the bits of base's values, as signed integers of the width of the dtype.

    Returns:
        False, with nothing changed, if the parts do not fit each other and the values.
    """
    if not _fits(gaps, small, large.size, values.size):
        return False
    kind, following = values.dtype.type, np.uint64(1)
    top, largest = kind(8 * values.itemsize - 1), kind(np.iinfo(values.dtype).max)
    place, done, used = np.uint64(0), np.uint64(0), np.uint64(0)
    for i in range(gaps.size):
        place += np.uint64(gaps[i])
        if gaps[i] == SKIP:
            continue
        step = kind(kind(small[done]) + kind(1))
        if small[done] == LARGE:
            step = large[used]
            used += following
        values[place] = _moved(values[place], step, top, largest)
        done += following
        place += following
    return True


_READ_ONLY = (
    "Array(uint8, 1, 'C', readonly=True), Array(uint8, 1, 'C', readonly=True), Array(int{0}, 1, 'C', readonly=True)"
)
apply16, apply32, apply64 = (
    loop(f"boolean({_READ_ONLY}, int{{0}}[::1])".format(width))(_apply) for width in (16, 32, 64)
)


@helper
def _look(values: Halves) -> tuple[bool, bool]:
    """Return whether all values are finite, and whether one is -0.0."""
    seen, zeros = np.uint16(0), np.uint16(0)
    for i in range(values.size):
        seen = np.uint16(seen | mark(np.uint16(values[i])))
        zeros = np.uint16(zeros | np.uint16(values[i] == _MINUS_ZERO))
    return is_unmarked(seen), zeros != np.uint16(0)


@helper
def _clear_unchanged(gaps: Bytes, values: Halves) -> None:
    """Make 0.0 of every -0.0 that no change belongs to."""
    start = np.uint64(0)
    for gap in range(gaps.size):
        end = start + np.uint64(gaps[gap])
        for i in range(start, end):
            values[i] = np.int16(0) if values[i] == _MINUS_ZERO else values[i]
        start = end + np.uint64(gaps[gap] != SKIP)
    for i in range(start, np.uint64(values.size)):
        values[i] = np.int16(0) if values[i] == _MINUS_ZERO else values[i]


@helper
def _find_places(gaps: Bytes, place: int, places: Places) -> tuple[int, int]:
    """Write down where the changes are that some gaps lead to; return their number, and where the next gap begins."""
    at, count = np.uint64(place), np.uint64(0)
    for i in range(gaps.size):
        is_change = np.uint64(gaps[i] != SKIP)
        at += np.uint64(gaps[i])
        places[count] = at  # overwritten where this is no change: a branch costs more
        count += is_change
        at += is_change
    return int(count), int(at)


@helper
def _find_steps(small: Bytes, large: Halves, used: int, steps: Halves) -> int:
    """Write down some steps; return how many of the large ones are used until here."""
    escapes = np.uint8(0)
    for i in range(small.size):
        escapes = np.uint8(escapes | np.uint8(small[i] == LARGE))
        steps[i] = np.int16(np.int16(small[i]) + np.int16(1))
    if escapes:
        for i in range(small.size):
            if small[i] == LARGE:
                steps[i] = large[np.uint64(used)]
                used += 1
    return used


@helper
def _combine(bases: Halves, steps: Halves, factor: float, from_aligned: bool) -> np.uint16:
    """Turn steps into results, rounded to nearest; return the joined marks of these and of aligned's values."""
    seen = np.uint16(0)
    for i in range(bases.size):
        new = np.uint16(_moved(bases[i], steps[i], np.int16(15), np.int16(0x7FFF)))
        base, aligned = widen(np.uint16(bases[i])), widen(new)
        result = round_bits(fma(factor, aligned - base, aligned if from_aligned else base))
        steps[i] = np.int16(result)
        seen = np.uint16(seen | np.uint16(mark(result) | mark(new)))
    return seen


@helper
def _combine_dithered(
    bases: Halves, steps: Halves, factor: float, from_aligned: bool, places: Places, key: int, index: int
) -> np.uint16:
    """Do the same, rounded dithered; ``places`` count from element ``index`` of the tensor."""
    seen = np.uint16(0)
    first, second = key_of(np.uint64(key), index)
    for i in range(bases.size):
        new = np.uint16(_moved(bases[i], steps[i], np.int16(15), np.int16(0x7FFF)))
        base, aligned = widen(np.uint16(bases[i])), widen(new)
        noise = noise_of(index + places[i], first, second)
        result = round_dithered(fma(factor, aligned - base, aligned if from_aligned else base), noise)
        steps[i] = np.int16(result)
        seen = np.uint16(seen | np.uint16(mark(result) | mark(new)))
    return seen


@loop(f"boolean({_READ_ONLY.format(16)}, int16[::1], float32, boolean, boolean, uint64, int64)")
def extrapolate(
    gaps: Bytes, small: Bytes, large: Halves, values: Halves, factor: float, from_aligned: bool, is_dithered: bool,
    key: int, index: int,
) -> bool:  # fmt: skip
    """Turn base's bf16 values into ``lerp(base, aligned, weight)`` in place, where aligned is base with changes.

    Args:
        gaps: see :func:`apply16`, as for the two parts that follow.
        small: the same.
        large: the same.
        values: the bits of base's values.
        factor: see :func:`~expo_serve.kernels.bf16.lerp_factor`.
        from_aligned: the same.
        is_dithered: whether to round dithered.
        key: the tensor's key, for that.
        index: the element of the tensor that the first value is, for that.

    Returns:
        True if the parts fit, and all operands and results are finite. If not, some values may be changed.
    """
    is_finite, has_minus_zeros = _look(values)
    if not is_finite or not _fits(gaps, small, large.size, values.size):
        return False
    if has_minus_zeros and not np.signbit(factor):  # lerp(-0.0, -0.0) is 0.0 then
        _clear_unchanged(gaps, values)
    places, steps, bases = np.empty(_CHUNK, np.uint32), np.empty(_CHUNK, np.int16), np.empty(_CHUNK, np.int16)
    seen = np.uint16(0)
    if key_of(np.uint64(key), index) != key_of(np.uint64(key), index + values.size):
        return False  # no block of a real model is there
    place = done = used = 0
    for first in range(0, gaps.size, _CHUNK):
        count, place = _find_places(gaps[first : first + _CHUNK], place, places)
        used = _find_steps(small[done : done + count], large, used, steps)
        done += count
        for i in range(count):
            bases[i] = values[places[i]]
        if is_dithered:
            found = _combine_dithered(bases[:count], steps[:count], factor, from_aligned, places, key, index)
        else:
            found = _combine(bases[:count], steps[:count], factor, from_aligned)
        seen = np.uint16(seen | found)
        for i in range(count):
            values[places[i]] = steps[i]
    return is_unmarked(seen)
