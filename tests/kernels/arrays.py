"""Tensors as the arrays that loops take."""

from __future__ import annotations

import torch

from expo_serve.kernels.bf16 import combine, lerp_factor
from expo_serve.load.dtypes import bf16_bits

EVERY = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
"""Every bf16 value."""
FINITE = EVERY[EVERY.isfinite()]


def combined(base: torch.Tensor, aligned: torch.Tensor, out: torch.Tensor, weight: float) -> bool:
    """Combine bf16 tensors by the loop."""
    return combine(bf16_bits(base), bf16_bits(aligned), bf16_bits(out), *lerp_factor(weight), False)
