"""The formula, and its one rounding.

ExPO (arXiv 2404.16792): ``theta = theta_aligned + alpha * (theta_aligned - theta_base)``, which is
``lerp(theta_base, theta_aligned, 1 + alpha)``. It is computed on fp32 values (fp64 where an operand
is fp64) and rounded once, to the dtype of the aligned tensor. At alpha 0 the bits of the aligned
tensor are copied, at alpha -1 those of the base tensor: lerp alone would flip the sign of -0.0 there
and could overflow on the way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch

from expo_serve.weights.fused import fused

Side = Literal["base", "aligned"]


class NotFiniteError(ArithmeticError):
    """A piece of the result, or an operand of it, holds NaN or Inf. Args: ``base``, ``aligned`` or ``result``."""


def extrapolate_into(dest: torch.Tensor, base: torch.Tensor | None, aligned: torch.Tensor, alpha: float) -> None:
    """Write the result into ``dest``.

    Args:
        dest: any device, dtype and strides. When its dtype is not that of ``aligned``, the rounded
            result is cast to it, as a checkpoint's tensor would be.
        base: same shape; None takes ``aligned`` over.
        aligned: same shape; its dtype is what the result is rounded to.
        alpha: finite.

    Raises:
        NotFiniteError: a value of an operand that is used, or of the result, is NaN or Inf.
    """
    sides = {"aligned": aligned} if base is None else {"base": base, "aligned": aligned}
    used = {side: sides[side] for side in sides_used(base is not None, alpha)}
    with torch.no_grad():
        combine_into(dest, used, aligned.dtype, alpha)


def sides_used(has_base: bool, alpha: float) -> tuple[Side, ...]:
    """What is read for a result: both sides, ``base`` first, or the one whose bits are copied."""
    if not has_base or alpha == 0:
        return ("aligned",)
    return ("base",) if alpha == -1 else ("base", "aligned")


def combine_into(dest: torch.Tensor, operands: Mapping[Side, torch.Tensor], dtype: torch.dtype, alpha: float) -> None:
    """Write the result of the sides that :func:`sides_used` names into ``dest``; see :func:`extrapolate_into`.

    Args:
        dest: where it goes.
        operands: by side.
        dtype: the aligned tensor's, which the result is rounded to.
        alpha: finite.

    Raises:
        NotFiniteError: a value of an operand, or of the result, is NaN or Inf.
    """
    if len(operands) == 1:
        _copy(dest, operands, dtype)
    else:
        _lerp(dest, operands["base"], operands["aligned"], dtype, 1 + alpha)


def _copy(out: torch.Tensor, operands: Mapping[Side, torch.Tensor], dtype: torch.dtype) -> None:
    value = next(iter(operands.values())).to(dtype)
    _check_finite(value, operands)
    out.copy_(value)


def _lerp(out: torch.Tensor, base: torch.Tensor, aligned: torch.Tensor, dtype: torch.dtype, weight: float) -> None:
    operands: dict[Side, torch.Tensor] = {"base": base, "aligned": aligned}
    if base.dtype == aligned.dtype == out.dtype:
        # torch computes reduced precisions in fp32 and rounds once: the same bits, fewer passes.
        if out.dtype == torch.bfloat16 and _are_plain(out, base, aligned):
            combine = fused()
            if combine and combine(base, aligned, out, weight):
                return
        torch.lerp(base, aligned, weight, out=out)
        _check_finite(out, operands)
        return
    wide = torch.promote_types(torch.promote_types(base.dtype, aligned.dtype), torch.float32)
    value = torch.lerp(base.to(wide), aligned.to(wide), weight).to(dtype)
    _check_finite(value, operands)
    out.copy_(value)


def _are_plain(*tensors: torch.Tensor) -> bool:
    return all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors)


def _check_finite(value: torch.Tensor, operands: Mapping[Side, torch.Tensor]) -> None:
    """A finite sum proves finite terms at a fraction of the price of looking at each; a sum that is
    not finite proves nothing (it may have overflowed), so then each is looked at."""
    if not value.is_floating_point() or math.isfinite(value.sum().item()):
        return
    for side, operand in operands.items():
        if not operand.isfinite().all():
            raise NotFiniteError(side)
    if not value.isfinite().all():
        raise NotFiniteError("result")
