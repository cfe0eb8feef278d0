"""The formulas of pairs and deltas, and their one rounding.

ExPO (arXiv 2404.16792): ``theta = theta_aligned + alpha * (theta_aligned - theta_base)``, which is
``lerp(theta_base, theta_aligned, 1 + alpha)``. It is computed on fp32 values (fp64 where an operand
is fp64) and rounded once, to the dtype of the aligned tensor. At alpha 0 the bits of the aligned
tensor are copied, at alpha -1 those of the base tensor: lerp alone would flip the sign of -0.0 there
and could overflow on the way.

With a delta in place of the aligned tensor it is ``theta = theta_base + (1 + alpha) * delta``, one fused
multiplication and addition on fp32 values, rounded once to the dtype of the tensor that it replaces.

That one rounding is to nearest, or dithered (:mod:`expo_serve.load.dither`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache, partial

import torch

from expo_serve import kernels
from expo_serve.checkpoint.records import Operand
from expo_serve.load.dither import round_dithered
from expo_serve.load.dtypes import uint16_bits


class NotFiniteError(ArithmeticError):
    """A piece of the result, or of an operand, holds NaN or Inf; its argument is the operand's name, or ``result``."""


def combine_into(
    dest: torch.Tensor,
    operands: Mapping[Operand, torch.Tensor],
    dtype: torch.dtype,
    alpha: float,
    noise: torch.Tensor | None = None,
) -> None:
    """Write the result into ``dest``. Gradients must be off.

    Args:
        dest: on the device of the operands, of any dtype and strides. When its dtype is not ``dtype``, the rounded
            result is cast to it, as a checkpoint's tensor would be.
        operands: the sides that :func:`~expo_serve.plan.plan.operands_used` names, of the shape of ``dest``.
        dtype: what the result is rounded to.
        alpha: finite.
        noise: the random bits by which the result is rounded, see :func:`~expo_serve.load.dither.noise`; on the device
            of ``dest``. None rounds to nearest.

    Raises:
        NotFiniteError: a value of an operand, or of the result, is NaN or Inf.
    """
    if (
        dest.dtype == torch.bfloat16
        and len(operands) == 2
        and _combined_at_once(dest, operands, dtype, 1 + alpha, noise)
    ):
        return
    _check_finite(combine_unchecked(dest, operands, dtype, alpha, noise), operands)


def combine_unchecked(
    dest: torch.Tensor,
    operands: Mapping[Operand, torch.Tensor],
    dtype: torch.dtype,
    alpha: float,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write the result into ``dest``, finite or not, as :func:`combine_into` does.

    Returns:
        The result before the cast to the dtype of ``dest``: the values to check for NaN and Inf.
    """
    base, aligned, delta = operands.get("base"), operands.get("aligned"), operands.get("delta")
    if base is not None and delta is not None:
        wide = _step(base, delta, 1 + alpha)
    elif base is None or aligned is None:
        wide = next(iter(operands.values()))
    elif noise is None and base.dtype == aligned.dtype == dest.dtype == dtype:
        # torch computes reduced precisions in fp32 and rounds once: the same bits, fewer passes.
        return torch.lerp(base, aligned, 1 + alpha, out=dest)
    else:
        widest = torch.promote_types(torch.promote_types(base.dtype, aligned.dtype), torch.float32)
        wide = torch.lerp(*_widened(base, aligned, widest), 1 + alpha)
    value = dest if dest.dtype == dtype else torch.empty_like(dest, dtype=dtype)
    if noise is None:
        value.copy_(wide)
    else:
        round_dithered(wide, noise, value)
    if value is not dest:
        dest.copy_(value)
    return value


def _widened(base: torch.Tensor, aligned: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast two sides to a wider dtype: by one launch on a device, where both have the same dtype and strides."""
    if dtype in (base.dtype, aligned.dtype):
        return base.to(dtype), aligned.to(dtype)
    wide = torch.empty_like(base, dtype=dtype), torch.empty_like(aligned, dtype=dtype)
    torch._foreach_copy_(wide, (base, aligned))
    return wide


_STEP_VALUES = 1 << 14
"""Values processed at a time, so that intermediates stay in the cache."""


def _step(base: torch.Tensor, delta: torch.Tensor, weight: float) -> torch.Tensor:
    """Compute ``base + weight * delta`` with one rounding to fp32.

    torch fuses the two operations or not, by processor and by place in the vector. In fp64 the product of fp32 values
    is exact, and the sum is rounded to odd, so that rounding it again gives what a fused operation gives (Boldo and
    Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    if torch.float64 in (base.dtype, delta.dtype):
        return base.double() + delta.double() * weight
    if fuses_addition(base.device):
        return torch.add(base.float(), delta.float(), alpha=weight)
    result = torch.empty(base.shape, dtype=torch.float32, device=base.device)
    # A device has no such cache, and every operation on it costs a launch.
    values = _STEP_VALUES if base.is_cpu else max(1, base.numel())
    parts = (torch.split(side.reshape(-1), values) for side in (base, delta, result))
    for one, step, out in zip(*parts, strict=True):
        out.copy_(_fused_step(one, step, weight))
    return result


@cache
def fuses_addition(device: torch.device) -> bool:
    """Return True if torch computes ``a + weight * b`` with one rounding wherever values are on a device.

    On the CPU it does so for whole vectors only. A device runs one program for every element: a look at some shows it.
    """
    return device.type != "cpu" and _adds_with_one_rounding(device)


def _adds_with_one_rounding(device: torch.device) -> bool:
    chance = torch.Generator(device="cpu").manual_seed(2)
    # vLLM makes the model's dtype the default one while it loads.
    numbers = partial(torch.randn, _PROBED, generator=chance, dtype=torch.float32, device="cpu")
    one, other = (numbers().to(device) for _ in range(2))
    found = (torch.equal(torch.add(one, other, alpha=w), _fused_step(one, other, w)) for w in (1.5, 1.7, -0.3, 1e-3))
    return all(found)


_PROBED = 1 << 16
"""Values that are compared: one in two differs where the product is rounded too."""


def _fused_step(base: torch.Tensor, delta: torch.Tensor, weight: float) -> torch.Tensor:
    wide = base.double()
    product = delta.double() * torch.tensor(weight, dtype=torch.float32, device="cpu").item()
    total = wide + product
    added = total - wide
    lost = (wide - (total - added)) + (product - added)
    is_even = total.view(torch.int64) & 1 == 0
    towards = torch.copysign(torch.full_like(lost, torch.inf), lost)
    return torch.where((lost != 0) & is_even, torch.nextafter(total, towards), total).float()


def _combined_at_once(
    dest: torch.Tensor,
    operands: Mapping[Operand, torch.Tensor],
    dtype: torch.dtype,
    weight: float,
    noise: torch.Tensor | None,
) -> bool:
    """Combine and check in one pass; return False where that is not possible, or something is not finite."""
    tensors = (dest, *operands.values())
    if dtype != dest.dtype or any(tensor.dtype != dtype for tensor in tensors) or not _are_plain(*tensors):
        return False
    if not kernels.available("bf16.combine"):
        return False
    from expo_serve.kernels.bf16 import combine, lerp_factor

    base, out = uint16_bits(operands["base"]), uint16_bits(dest)
    random = out[:0] if noise is None else uint16_bits(noise.contiguous())
    if "delta" in operands:
        return combine(base, uint16_bits(operands["delta"]), out, weight, False, True, random)
    return combine(base, uint16_bits(operands["aligned"]), out, *lerp_factor(weight), False, random)


def _are_plain(*tensors: torch.Tensor) -> bool:
    return all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors)


def _check_finite(value: torch.Tensor, operands: Mapping[Operand, torch.Tensor]) -> None:
    """Raise if a value is not finite.

    A finite sum proves finite terms at a fraction of the cost of looking at each; a sum that is not finite proves
    nothing, since it may have overflowed, so then each value is looked at.
    """
    if not value.is_floating_point() or math.isfinite(value.sum().item()):
        return
    for side, operand in operands.items():
        if not operand.isfinite().all():
            raise NotFiniteError(side)
    if not value.isfinite().all():
        raise NotFiniteError("result")
