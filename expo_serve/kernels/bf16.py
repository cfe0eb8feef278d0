"""The formula for bf16 in one pass: combine, round once, and notice what is not finite.

torch needs two passes (lerp, then a sum that shows whether all values are finite) and takes twice as long. The bits are
those of :func:`torch.lerp`, which :func:`expo_serve.kernels.available` checks before any loop of this room is used.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import types

from expo_serve.kernels.compiling import Intrinsic, helper, intrinsic, loop
from expo_serve.kernels.dither import key_of, noise_of, word_of

Bits = npt.NDArray[np.uint16]
"""bf16 values as unsigned integers, flat and contiguous."""
_LOW, _HIGH = np.uint32(0x0000FFFF), np.uint32(0xFFFF0000)


@intrinsic(np.float32)
def fma(typing: object, a: object, b: object, c: object) -> Intrinsic:
    """Compute ``a * b + c`` with one rounding."""
    single = types.float32
    return single(single, single, single), lambda context, builder, signature, values: builder.fma(*values)


@intrinsic(np.float32)
def as_float(typing: object, bits: object) -> Intrinsic:
    """Reinterpret 32 bits as a float."""
    return types.float32(types.uint32), _bitcast


@intrinsic(np.uint32)
def as_bits(typing: object, value: object) -> Intrinsic:
    """Reinterpret a float as 32 bits."""
    return types.uint32(types.float32), _bitcast


def _bitcast(context, builder, signature, values):  # type: ignore[no-untyped-def]  # numba's and LLVM's objects
    return builder.bitcast(values[0], context.get_value_type(signature.return_type))


@helper
def widen(value: np.uint16) -> np.float32:
    """Turn bf16 into fp32, which is exact."""
    return as_float(np.uint32(np.uint32(value) << np.uint32(16)))


@helper
def round_bits(value: np.float32) -> np.uint16:
    """Round to the nearest bf16, ties to even, as torch does: add 0x7fff and the last bit that is kept."""
    bits = as_bits(value)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd) >> np.uint32(16))


@helper
def round_dithered(value: np.float32, noise: np.uint16) -> np.uint16:
    """Round to one of the two nearest bf16 by random bits, see :mod:`expo_serve.kernels.dither`."""
    return np.uint16(np.uint32(as_bits(value) + np.uint32(noise)) >> np.uint32(16))


@helper
def mark(value: np.uint16) -> np.uint16:
    """Set bit 15 for Inf and NaN, and for nothing else: only their exponent, 0x7f80, overflows when 0x80 is added."""
    return np.uint16(np.uint16(value & np.uint16(0x7F80)) + np.uint16(0x80))


@helper
def is_unmarked(seen: np.uint16) -> bool:
    """Return True if none of the values whose marks were joined by ``or`` is Inf or NaN."""
    return not seen & np.uint16(0x8000)


@intrinsic(np.uint32)
def pair_at(typing: object, values: object, index: object) -> Intrinsic:
    """Load values ``2 * index`` and the next one as one word; the first is its lower half."""
    return types.uint32(values, types.intp), _load_pair


@intrinsic(int)
def set_pair(typing: object, values: object, index: object, pair: object) -> Intrinsic:
    """Store values ``2 * index`` and the next one; return 0."""
    return types.intp(values, types.intp, types.uint32), _store_pair


def _load_pair(context, builder, signature, values):  # type: ignore[no-untyped-def]  # numba's and LLVM's objects
    address = _pair_address(context, builder, signature, values)  # type: ignore[no-untyped-call]
    return builder.load(address, align=2)


def _store_pair(context, builder, signature, values):  # type: ignore[no-untyped-def]  # the same
    address = _pair_address(context, builder, signature, values)  # type: ignore[no-untyped-call]
    builder.store(values[2], address, align=2)
    return context.get_constant(types.intp, 0)


def _pair_address(context, builder, signature, values):  # type: ignore[no-untyped-def]  # the same
    array = context.make_array(signature.args[0])(context, builder, values[0])
    words = builder.bitcast(array.data, context.get_value_type(types.uint32).as_pointer())
    return builder.gep(words, [values[1]])


@helper
def _low(pair: np.uint32) -> np.float32:
    """Widen the first value of a pair."""
    return as_float(np.uint32(pair << np.uint32(16)))


@helper
def _high(pair: np.uint32) -> np.float32:
    """Widen the second value of a pair."""
    return as_float(np.uint32(pair & _HIGH))


@helper
def _moved(base: np.float32, other: np.float32, factor: float, from_other: bool, is_delta: bool) -> np.uint32:
    """Return the bits of ``start + factor * step`` in fp32."""
    return as_bits(fma(factor, other if is_delta else other - base, other if from_other else base))


@helper
def _carry(bits: np.uint32) -> np.uint32:
    """Add what rounds the upper half to the nearest, ties to even."""
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    return np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd)


@helper
def _joined(first: np.uint32, second: np.uint32) -> np.uint32:
    """Make a pair of the upper halves of two words."""
    return np.uint32(np.uint32(first >> np.uint32(16)) | np.uint32(second & _HIGH))


@helper
def _mark_pair(pair: np.uint32) -> np.uint32:
    """Do for both values what :func:`mark` does for one."""
    return np.uint32(np.uint32(pair & np.uint32(0x7F807F80)) + np.uint32(0x00800080))


@helper
def _are_unmarked(seen: np.uint32) -> bool:
    return not seen & np.uint32(0x80008000)


@helper
def combine_nearest(base: Bits, other: Bits, out: Bits, factor: float, from_other: bool, is_delta: bool) -> bool:
    """Do what :func:`combine` does, rounded to nearest.

    Values are taken in pairs, as words of 32 bits: widening them takes half of the instructions that it takes to make
    two vectors out of one of 16-bit values, and a pair of results needs no packing.
    """
    seen = np.uint32(0)  # 32 bits: a wider accumulator, which plain |= would make, is two to three times slower
    for i in range(out.size >> 1):
        one, two = pair_at(base, i), pair_at(other, i)
        low = _carry(_moved(_low(one), _low(two), factor, from_other, is_delta))
        high = _carry(_moved(_high(one), _high(two), factor, from_other, is_delta))
        result = _joined(low, high)
        set_pair(out, i, result)
        seen = np.uint32(seen | _mark_pair(result))
    for i in range(out.size & ~1, out.size):
        out[i] = round_bits(as_float(_moved(widen(base[i]), widen(other[i]), factor, from_other, is_delta)))
        seen = np.uint32(seen | np.uint32(mark(out[i])))
    return _are_unmarked(seen)


@loop("boolean(uint16[::1], uint16[::1], uint16[::1], float32, boolean, boolean, uint16[::1])")
def combine(base: Bits, other: Bits, out: Bits, factor: float, from_other: bool, is_delta: bool, noise: Bits) -> bool:
    """Compute ``start + factor * step`` for each value, in fp32, and round it once.

    Args:
        base: values of the base tensor.
        other: as many of the aligned tensor, or of a delta.
        out: as many results; not the memory of the others.
        factor: how far to go along the step, see :func:`lerp_factor`; for a delta 1 + alpha.
        from_other: whether to start from ``other`` instead of from ``base``.
        is_delta: whether ``other`` is the step itself; else the step is ``other - base``.
        noise: the random bits of each value, to round dithered; empty to round to nearest.

    Returns:
        True if every result is finite.
    """
    if not noise.size:
        return combine_nearest(base, other, out, factor, from_other, is_delta)
    seen = np.uint16(0)
    for i in range(out.size):
        moved = _moved(widen(base[i]), widen(other[i]), factor, from_other, is_delta)
        result = round_dithered(as_float(moved), noise[i])
        out[i] = result
        seen = np.uint16(seen | mark(result))
    return is_unmarked(seen)


@helper
def combine_dithered(
    base: Bits, other: Bits, out: Bits, factor: float, from_other: bool, is_delta: bool, key: int, index: int
) -> bool:
    """Do what :func:`combine` does, rounded dithered by the random bits of elements ``index`` and on of a tensor.

    All elements share one key, see :func:`~expo_serve.kernels.dither.key_of`. A word of random bits belongs to an even
    element and the next one, as a pair does.
    """
    first, second = key_of(np.uint64(key), index)
    head = min(index & 1, out.size)
    whole = (out.size - head) >> 1
    counter = np.uint32(np.uint64(index + head) >> np.uint64(1))
    ones, twos, to = base[head:], other[head:], out[head:]
    seen = np.uint32(0)
    for i in range(whole):
        one, two, random = pair_at(ones, i), pair_at(twos, i), word_of(counter, first, second)
        counter = np.uint32(counter + np.uint32(1))
        low = np.uint32(_moved(_low(one), _low(two), factor, from_other, is_delta) + np.uint32(random & _LOW))
        high = _moved(_high(one), _high(two), factor, from_other, is_delta)
        result = _joined(low, np.uint32(high + np.uint32(random >> np.uint32(16))))
        set_pair(to, i, result)
        seen = np.uint32(seen | _mark_pair(result))
    ends = (0, head + 2 * whole)  # what is no whole pair
    for i, is_there in zip(ends, (head > 0, head + 2 * whole < out.size)):  # noqa: B905 - not for numba
        if not is_there:
            continue
        moved = _moved(widen(base[i]), widen(other[i]), factor, from_other, is_delta)
        out[i] = round_dithered(as_float(moved), noise_of(index + i, first, second))
        seen = np.uint32(seen | np.uint32(mark(out[i])))
    return _are_unmarked(seen)


def lerp_factor(weight: float) -> tuple[float, bool]:
    """Turn the weight of a lerp into what :func:`combine` wants.

    ``lerp(base, aligned, weight)`` is ``base + weight * (aligned - base)``, which is the same as ``aligned + (weight -
    1) * (aligned - base)``. As torch does, start from the nearer side, so that weights of 0 and 1 give that side's
    value.

    Args:
        weight: 1 + alpha.

    Returns:
        The factor, and whether to start from aligned.
    """
    single = np.float32(weight)
    from_aligned = bool(abs(single) >= 0.5)
    return float(single - np.float32(1) if from_aligned else single), from_aligned
