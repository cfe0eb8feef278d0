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


def round_dithered(values: torch.Tensor, random: torch.Tensor, out: torch.Tensor) -> None:
    """Round to one of the two nearest values of a dtype, to the farther one with the probability of the nearer's share.

    Args:
        values: of any floating-point dtype; fp64 is rounded to fp32 first, to nearest.
        random: int16 of the same shape, on the same device, see :func:`noise`.
        out: bf16 or fp16, of the same shape, on the same device, with any strides.
    """
    single = values.float()
    if single.is_cpu and (rounded := _rounded_by_loop(single, random, out.dtype)) is not None:
        out.copy_(rounded)
    elif out.dtype == torch.bfloat16:
        _round_to_bf16(single, random, out)
    else:
        _round_to_fp16(single, random, out)


def _round_to_bf16(values: torch.Tensor, random: torch.Tensor, out: torch.Tensor) -> None:
    """Add the random bits to the lower half of each value, and keep the upper one."""
    added = random.view(torch.uint16).to(torch.int32)
    # A NaN gets nothing: one of all ones, which is what devices compute, would overflow to -0.0.
    added.masked_fill_(values.ne(values), 0).add_(values.view(torch.int32))
    out.copy_(_upper_halves(added).view(torch.bfloat16))


def _round_to_fp16(values: torch.Tensor, random: torch.Tensor, out: torch.Tensor) -> None:
    """Count the units in the last place of fp16 that are in each value, in fp64, where all of this is exact.

    By their bits, subnormal values would have to be rounded apart from others: three times as many operations, each of
    which costs a launch.
    """
    # The power of two at or below each value, at least that of the smallest normal one; a unit is 2**-10 of it.
    powers = values.view(torch.int32).bitwise_and(0xFF << 23).clamp_(min=113 << 23, max=254 << 23).view(torch.float32)
    wide = torch.empty(values.shape, dtype=torch.float64, device=values.device)
    shares = torch.copysign(random.view(torch.uint16), values, out=wide)
    counts = shares.addcdiv_(values, powers, value=2.0**26).div_(2.0**16, rounding_mode="trunc")
    torch.mul(counts.mul_(powers), 2.0**-10, out=out)


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
    """Hash counters, to which the first half of the key is added already; they are lost."""
    _fold(words)
    if isinstance(second, int):
        words = torch.rsub(words, _signed(second), alpha=-_signed(_FIRST))
    else:
        words.mul_(_signed(_FIRST)).add_(second)
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
