"""The random bits of dithered rounding, and rounding by them: docs/number-rule.md#dithered has the rule.

Element ``i`` of a tensor gets 16 bits: one half of the 32 that a hash of ``i // 2`` and the tensor's key gives. So they
depend on nothing but the tensor and the element, and two neighbours cost one hash. The hash is the 32-bit integer hash
that Chris Wellons found by search (``lowbias32``, https://nullprogram.com/blog/2018/07/31/), with the key added before
its first and before its second multiplication.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from expo_serve.kernels.compiling import helper, loop

Bits = npt.NDArray[np.uint16]
"""16-bit values as unsigned integers, flat and contiguous."""
Words = npt.NDArray[np.uint32]
Singles = npt.NDArray[np.uint32]
"""fp32 values as unsigned integers, flat and contiguous."""
Offsets = npt.NDArray[np.int64]
CHUNK = 4096
"""Values at a time: their random bits stay in the L1 cache. A divisor of 2**33, at which a key changes."""
_EXPONENT = np.uint32(0x7F800000)
_LEAST_NORMAL_HALF = np.uint32(113 << 23)
"""2**-14 as fp32."""


@helper
def key_of(key: np.uint64, index: int) -> tuple[np.uint32, np.uint32]:
    """Return the two halves of a tensor's key for the elements around ``index``, of which 2**33 share them."""
    high = np.uint32(np.uint64(index) >> np.uint64(33))
    first, second = np.uint32(key & np.uint64(0xFFFFFFFF)), np.uint32(key >> np.uint64(32))
    return first, np.uint32(second + np.uint32(high * np.uint32(0x9E3779B9)))


@helper
def word_of(counter: np.uint32, first: np.uint32, second: np.uint32) -> np.uint32:
    """Hash a counter, with the two halves of a key."""
    x = np.uint32(counter + first)
    x = np.uint32(np.uint32(x ^ np.uint32(x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(x + second)
    x = np.uint32(np.uint32(x ^ np.uint32(x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ np.uint32(x >> np.uint32(16)))


@helper
def noise_of(index: int, first: np.uint32, second: np.uint32) -> np.uint16:
    """Return the 16 bits of one element."""
    word = word_of(np.uint32(np.uint64(index) >> np.uint64(1)), first, second)
    return np.uint16(np.uint32(word >> np.uint32(np.uint32(16) * np.uint32(index & 1))))


@helper
def chunk_of(index: int, left: int) -> int:
    """Return how many of ``left`` elements from ``index`` on are in its chunk."""
    return min(left, CHUNK - index % CHUNK)


@helper
def fill_chunk(words: Words, key: np.uint64, index: int, count: int) -> Bits:
    """Compute the bits of elements of one chunk.

    Args:
        words: scratch memory for ``CHUNK // 2 + 1`` words.
        key: the tensor's.
        index: the first element.
        count: elements, see :func:`chunk_of`.

    Returns:
        A view of ``words`` with the bits of each element.
    """
    first, second = key_of(key, index)
    counter = np.uint32(np.uint64(index) >> np.uint64(1))
    odd = index & 1
    for i in range((odd + count + 1) >> 1):
        words[i] = word_of(counter, first, second)
        counter = np.uint32(counter + np.uint32(1))
    return words.view(np.uint16)[odd : odd + count]


@loop("void(int64[::1], int64, uint64, uint16[::1])")
def fill(starts: Offsets, extent: int, key: int, out: Bits) -> None:
    """Compute the bits of extents of one length, one after another.

    Args:
        starts: the index at which each begins.
        extent: elements in each.
        key: the tensor's.
        out: as many values as the extents have together.
    """
    words = np.empty(CHUNK // 2 + 1, np.uint32)
    for number in range(starts.size):
        done = 0
        while done < extent:
            index = starts[number] + done
            count = chunk_of(index, extent - done)
            noise = fill_chunk(words, np.uint64(key), index, count)
            to = out[number * extent + done : number * extent + done + count]
            for i in range(count):
                to[i] = noise[i]
            done += count


@loop("void(uint32[::1], uint16[::1], uint16[::1])")
def round_to_bf16(values: Singles, noise: Bits, out: Bits) -> None:
    """Round fp32 to bf16: the bits are added where those begin that are lost. Inf and NaN stay what they are.

    Args:
        values: fp32.
        noise: the bits of each value.
        out: bf16.
    """
    for i in range(out.size):
        is_finite = np.uint32(values[i] & _EXPONENT) != _EXPONENT
        added = np.uint32(noise[i]) if is_finite else np.uint32(0)
        out[i] = np.uint16(np.uint32(values[i] + added) >> np.uint32(16))


@loop("void(uint32[::1], uint16[::1], uint16[::1])")
def round_to_fp16(values: Singles, noise: Bits, out: Bits) -> None:
    """Round fp32 to fp16, below 2**-14 to multiples of 2**-24; too large a value, Inf and NaN become Inf.

    Args:
        values: fp32.
        noise: the bits of each value.
        out: fp16.
    """
    for i in range(out.size):
        size = np.uint32(values[i] & np.uint32(0x7FFFFFFF))
        normal = np.uint32(size - np.uint32(112 << 23) + np.uint32(noise[i] >> np.uint16(3))) >> np.uint32(13)
        # A subnormal as a fixed-point number with 16 bits after the point, floor(size * 2**40).
        exponent = min(np.uint32(size >> np.uint32(23)), np.uint32(112))
        fraction = np.uint32(np.uint32(size & np.uint32(0x7FFFFF)) | np.uint32(0x800000))
        fixed = np.uint32(fraction << np.uint32(2)) >> min(np.uint32(np.uint32(112) - exponent), np.uint32(31))
        subnormal = np.uint32(fixed + np.uint32(noise[i])) >> np.uint32(16)
        rounded = normal if size >= _LEAST_NORMAL_HALF else subnormal
        rounded = min(rounded, np.uint32(0x7C00)) if size < _EXPONENT else np.uint32(0x7C00)
        out[i] = np.uint16(rounded | np.uint32(np.uint32(values[i] >> np.uint32(16)) & np.uint32(0x8000)))
