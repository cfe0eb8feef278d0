"""Combining whole tensors in memory, as the loader combines pieces of them."""

from __future__ import annotations

import torch

from expo_serve.checkpoint.records import Operand
from expo_serve.load.formula import combine_into
from expo_serve.plan.plan import operands_used


def extrapolate_into(dest: torch.Tensor, base: torch.Tensor | None, aligned: torch.Tensor, alpha: float) -> None:
    """Write the result of two tensors into ``dest``; without ``base`` that of ``aligned`` alone."""
    sides: dict[Operand, torch.Tensor] = {"aligned": aligned} if base is None else {"base": base, "aligned": aligned}
    used = {side: sides[side] for side in operands_used(base is not None, alpha)}
    with torch.no_grad():
        combine_into(dest, used, aligned.dtype, alpha)
