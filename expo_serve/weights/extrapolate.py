"""The formula, and its one rounding.

ExPO (arXiv 2404.16792): ``theta = theta_aligned + alpha * (theta_aligned - theta_base)``, which is
``lerp(theta_base, theta_aligned, 1 + alpha)``. It is computed on fp32 values (fp64 where an operand
is fp64) and rounded once, to the dtype of the aligned tensor. At alpha 0 the bits of the aligned
tensor are copied, at alpha -1 those of the base tensor: lerp alone would flip the sign of -0.0 there
and could overflow on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

PIECE_ELEMENTS = 1 << 20
"""Elements combined at a time: 2 MB an operand in bf16. Smaller pieces stay nearer in the cache, but cost more
calls; 2**18 and 2**22 both took longer (loads of 1.1 B parameters, one and two threads)."""


class NotFiniteError(ArithmeticError):
    """A piece of the result, or an operand of it, holds NaN or Inf. Args: ``base``, ``aligned`` or ``result``."""


def extrapolate_into(dest: torch.Tensor, base: torch.Tensor | None, aligned: torch.Tensor, alpha: float) -> None:
    """Write the result into ``dest``, piece by piece.

    Args:
        dest: any device, dtype and strides. When its dtype is not that of ``aligned``, the rounded
            result is cast to it, as a checkpoint's tensor would be.
        base: same shape; None takes ``aligned`` over.
        aligned: same shape; its dtype is what the result is rounded to.
        alpha: finite.

    Raises:
        NotFiniteError: a value of an operand that is used, or of the result, is NaN or Inf.
    """
    used = operands_used(base, aligned, alpha)
    with torch.no_grad():
        for out, *sides in pieces(dest, *used.values()):
            if len(sides) == 1:
                _copy(out, sides[0], aligned.dtype, *used)
            else:
                _lerp(out, sides[0], sides[1], 1 + alpha)


def operands_used(base: torch.Tensor | None, aligned: torch.Tensor, alpha: float) -> dict[str, torch.Tensor]:
    """What is read for a result, by side: ``base`` before ``aligned``, or the one whose bits are copied."""
    if base is None or alpha == 0:
        return {"aligned": aligned}
    return {"base": base} if alpha == -1 else {"base": base, "aligned": aligned}


def pieces(*tensors: torch.Tensor, limit: int = PIECE_ELEMENTS) -> Iterator[tuple[torch.Tensor, ...]]:
    """Cut tensors of one shape into matching views of at most ``limit`` elements each."""
    first = tensors[0]
    if first.numel() <= limit:
        yield tensors
    elif all(tensor.is_contiguous() for tensor in tensors):
        yield from zip(*(torch.split(tensor.view(-1), limit) for tensor in tensors), strict=True)
    elif (row := first.numel() // first.shape[0]) > limit:
        for rows in zip(*(tensor.unbind(0) for tensor in tensors), strict=True):
            yield from pieces(*rows, limit=limit)
    else:
        yield from zip(*(torch.split(tensor, limit // row) for tensor in tensors), strict=True)


def _copy(out: torch.Tensor, side: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    value = side.to(dtype)
    _check_finite(value, **{name: side})
    out.copy_(value)


def _lerp(out: torch.Tensor, base: torch.Tensor, aligned: torch.Tensor, weight: float) -> None:
    base, aligned = base.to(out.device), aligned.to(out.device)
    if base.dtype == aligned.dtype == out.dtype:
        # torch computes reduced precisions in fp32 and rounds once: the same bits, fewer passes.
        torch.lerp(base, aligned, weight, out=out)
        _check_finite(out, base=base, aligned=aligned)
        return
    wide = torch.promote_types(torch.promote_types(base.dtype, aligned.dtype), torch.float32)
    value = torch.lerp(base.to(wide), aligned.to(wide), weight).to(aligned.dtype)
    _check_finite(value, base=base, aligned=aligned)
    out.copy_(value)


def _check_finite(value: torch.Tensor, **operands: torch.Tensor) -> None:
    """A finite sum proves finite terms at a fraction of the price of looking at each; a sum that is
    not finite proves nothing (it may have overflowed), so then each is looked at."""
    if not value.is_floating_point() or math.isfinite(value.sum().item()):
        return
    for side, operand in operands.items():
        if not operand.isfinite().all():
            raise NotFiniteError(side)
    if not value.isfinite().all():
        raise NotFiniteError("result")
