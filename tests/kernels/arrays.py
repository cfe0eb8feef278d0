"""Tensors as the arrays that loops take."""

from __future__ import annotations

import numpy as np
import torch

from expo_serve.kernels.bf16 import combine, lerp_factor
from expo_serve.load.dtypes import uint16_bits

NEAREST = np.empty(0, np.uint16)
"""No random bits: the loops round to nearest."""
EVERY = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
"""Every bf16 value."""
FINITE = EVERY[EVERY.isfinite()]


def combined(base: torch.Tensor, aligned: torch.Tensor, out: torch.Tensor, weight: float) -> bool:
    """Combine bf16 tensors by the loop."""
    return combine(uint16_bits(base), uint16_bits(aligned), uint16_bits(out), *lerp_factor(weight), False, NEAREST)
