"""The formula for bf16 in one pass: combine, round once, and notice what is not finite.

torch needs two passes (lerp, then a sum that shows whether all values are finite) and takes twice as long. The bits are
those of :func:`torch.lerp`, which :func:`expo_serve.kernels.available` checks before any loop of this room is used.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import types

from expo_serve.kernels.compiling import Intrinsic, helper, intrinsic, loop

Bits = npt.NDArray[np.uint16]
"""bf16 values as unsigned integers, flat and contiguous."""


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
    # An accumulator of 16 bits: a wider one, which plain |= would make, is two to three times slower.
    seen = np.uint16(0)
    if noise.size:
        for i in range(out.size):
            start, end = widen(base[i]), widen(other[i])
            value = fma(factor, end if is_delta else end - start, end if from_other else start)
            result = round_dithered(value, noise[i])
            out[i] = result
            seen = np.uint16(seen | mark(result))
        return is_unmarked(seen)
    for i in range(out.size):
        start, end = widen(base[i]), widen(other[i])
        value = fma(factor, end if is_delta else end - start, end if from_other else start)
        result = round_bits(value)
        out[i] = result
        seen = np.uint16(seen | mark(result))
    return is_unmarked(seen)


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
