"""Dithered rounding in torch, on any device, and the random bits of any selection: docs/number-rule.md#dithered.

The compiled loops (:mod:`expo_serve.kernels.dither`) do the same on the CPU; what is here serves devices, and machines
without the loops. torch has no unsigned arithmetic of 32 bits everywhere, so words are int32, whose products wrap.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from expo_serve import kernels
from expo_serve.load.dtypes import uint16_bits, uint32_bits
from expo_serve.load.selection import Selection

_SHARED = 1 << 33
"""Elements from one change of the key to the next."""
_STEP, _FIRST, _SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B
_FP16_BITS_OF_INF = 0x7C00


def noise(selection: Selection, key: int, device: torch.device) -> torch.Tensor:
    """Return the 16 random bits of each element.

    Args:
        selection: which elements of the tensor.
        key: the tensor's, see :meth:`~expo_serve.config.Rounding.key`.
        device: where they are computed.

    Returns:
        int16, of the selection's shape.
    """
    if device.type == "cpu" and kernels.available("dither.fill"):
        return _by_loop(selection, key)
    if selection.is_contiguous and selection.offset // _SHARED == (selection.end - 1) // _SHARED:
        return _of_contiguous(selection, key, device)
    return _of_any(selection, key, device)


def round_dithered(values: torch.Tensor, random: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to one of the two nearest values of a dtype, to the farther one with the probability of the nearer's share.

    Args:
        values: of any floating-point dtype; fp64 is rounded to fp32 first, to nearest.
        random: int16 of the same shape, on the same device, see :func:`noise`.
        dtype: bf16 or fp16.
    """
    single = values.float()
    if single.is_cpu and (rounded := _rounded_by_loop(single, random, dtype)) is not None:
        return rounded
    bits, added = single.view(torch.int32), random.view(torch.uint16).to(torch.int32)
    if dtype == torch.bfloat16:
        # A NaN gets nothing: one of all ones, which is what devices compute, would overflow to -0.0.
        added.masked_fill_(single.ne(single), 0).add_(bits)
        return _upper_halves(added).view(dtype)
    size = single.abs()
    normal = ((size.view(torch.int32) - (112 << 23)) + (added >> 3)) >> 13
    fixed = ((size.clamp(max=2.0**-14) * 2.0**40).to(torch.int32) + added) >> 16
    rounded = torch.where(size < 2.0**-14, fixed, normal).clamp_(max=_FP16_BITS_OF_INF)
    rounded.masked_fill_(single.isfinite().logical_not_(), _FP16_BITS_OF_INF)
    return (rounded | (bits >> 16) & 0x8000).to(torch.int16).view(dtype)


def _upper_halves(words: torch.Tensor) -> torch.Tensor:
    """Return a view of the upper 16 bits of int32 values."""
    return words.unsqueeze(-1).view(torch.int16)[..., int(sys.byteorder == "little")]


def _rounded_by_loop(values: torch.Tensor, random: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    loop: kernels.Loop = "dither.round_to_bf16" if dtype == torch.bfloat16 else "dither.round_to_fp16"
    if not kernels.available(loop):
        return None
    from expo_serve.kernels import dither

    function = dither.round_to_bf16 if dtype == torch.bfloat16 else dither.round_to_fp16
    out = torch.empty(values.shape, dtype=torch.int16, device="cpu")
    function(uint32_bits(values.contiguous()), uint16_bits(random.contiguous()), uint16_bits(out))
    return out.view(dtype)


def _by_loop(selection: Selection, key: int) -> torch.Tensor:
    """Compute the bits extent by extent, in the order of the file, as a reader would read them."""
    from expo_serve.kernels.dither import fill

    if selection.is_contiguous:
        out = torch.empty(selection.shape, dtype=torch.int16, device="cpu")
        fill(np.array([selection.offset]), selection.numel, key, uint16_bits(out))
        return out
    ordered, positions = selection.in_file_order()
    out = torch.empty(ordered.shape, dtype=torch.int16, device="cpu")
    starts = np.ascontiguousarray(ordered.extent_starts())
    fill(starts, ordered.extent, key, uint16_bits(out))
    return out.permute(positions).expand(selection.shape)


def _of_contiguous(selection: Selection, key: int, device: torch.device) -> torch.Tensor:
    """Hash each pair of elements once: two of them are the halves of an int32."""
    first, second = _key_of(key, selection.offset)
    odd, start = selection.offset & 1, (selection.offset >> 1) & 0xFFFFFFFF
    words = _counters(_signed(start + first), (odd + selection.numel + 1) >> 1, device)
    halves = _hash(words, second).view(torch.int16)
    return halves[odd : odd + selection.numel].view(selection.shape)


def _counters(start: int, count: int, device: torch.device) -> torch.Tensor:
    """Return ``count`` int32 words from ``start`` on; they wrap around."""
    if start + count <= 1 << 31:
        return torch.arange(start, start + count, dtype=torch.int32, device=device)
    return torch.arange(count, dtype=torch.int32, device=device).add_(start)


def _of_any(selection: Selection, key: int, device: torch.device) -> torch.Tensor:
    """Hash each element's pair by itself."""
    index = torch.full((1,) * len(selection.shape), selection.offset, dtype=torch.int64, device=device)
    for dim, (size, stride) in enumerate(zip(selection.shape, selection.stride, strict=True)):
        step = torch.arange(size, dtype=torch.int64, device=device).mul_(stride)
        index = index + step.view([-1 if place == dim else 1 for place in range(len(selection.shape))])
    first, second = _key_of(key, 0)
    seconds = (index >> 33).to(torch.int32).mul_(_signed(_STEP)).add_(_signed(second))
    words = _hash((index >> 1).to(torch.int32).add_(_signed(first)), seconds)
    return torch.where(index & 1 == 1, words >> 16, words).to(torch.int16)


def _key_of(key: int, index: int) -> tuple[int, int]:
    """Return the two halves of a tensor's key for the elements around ``index``."""
    return key & 0xFFFFFFFF, ((key >> 32) + (index // _SHARED) * _STEP) & 0xFFFFFFFF


def _hash(words: torch.Tensor, second: int | torch.Tensor) -> torch.Tensor:
    """Hash counters, to which the first half of the key is added already, in place."""
    _fold(words)
    words.mul_(_signed(_FIRST))
    words.add_(_signed(second) if isinstance(second, int) else second)
    words.bitwise_xor_((words >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(_SECOND))
    _fold(words)
    return words


def _fold(words: torch.Tensor) -> None:
    """Combine the lower halves of words with the upper ones: ``words ^= words >>> 16``, by one operation."""
    halves = words.unsqueeze(-1).view(torch.int16)
    upper = int(sys.byteorder == "little")
    halves[..., 1 - upper].bitwise_xor_(halves[..., upper])


def _signed(word: int) -> int:
    """Return the int32 with the lowest 32 bits of an integer."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
