"""Does the compiled loop give the bits of torch?"""

from __future__ import annotations

import numpy as np
import torch

from expo_serve.kernels.bf16 import Bits, combine, lerp_factor

_WEIGHTS = (1.5, 0.3, -2.0, 9.0, 1.0001)
"""On both sides of 0.5, where lerp starts from the other side."""
_CHUNK = 1 << 14
"""Values at a time. torch does fewer than 32,768 in the calling thread; with its threads a probe took seconds on a busy
machine."""


def gives_bits_of_torch() -> bool:
    """Compare with :func:`torch.lerp` on every finite bf16 value, and on a few: vectorised loops do their last values
    apart."""
    every = torch.arange(2**16, dtype=torch.int32, device="cpu").to(torch.int16).view(torch.bfloat16)
    aligned = every[every.isfinite()]
    near = (aligned.float() * 1.01).bfloat16()
    pairs = [(aligned.flip(0), aligned), (near, aligned), (near[:13], aligned[:13]), (near[5:42], aligned[5:42])]
    return all(
        _same(one, other, weight)
        for base, aligned in pairs
        for one, other in zip(torch.split(base, _CHUNK), torch.split(aligned, _CHUNK), strict=True)
        for weight in _WEIGHTS
    )


def _same(base: torch.Tensor, aligned: torch.Tensor, weight: float) -> bool:
    random = torch.arange(aligned.numel(), dtype=torch.int32, device="cpu").mul_(40503).bitwise_and_(0xFFFF)
    exact = torch.lerp(base.float(), aligned.float(), weight)
    dithered = ((exact.view(torch.int32) + random) >> 16).to(torch.int16).view(torch.bfloat16)
    none, some = np.empty(0, np.uint16), random.to(torch.int16).numpy().view(np.uint16)
    return all(
        _gives(base, aligned, weight, noise, expected)
        for noise, expected in ((none, torch.lerp(base, aligned, weight)), (some, dithered))
    )


def _gives(base: torch.Tensor, aligned: torch.Tensor, weight: float, noise: Bits, expected: torch.Tensor) -> bool:
    found = torch.empty_like(aligned)
    is_finite = combine(_bits(base), _bits(aligned), _bits(found), *lerp_factor(weight), False, noise)
    finite = expected.isfinite()
    same = torch.equal(found[finite].view(torch.int16), expected[finite].view(torch.int16))
    return same and is_finite == bool(finite.all())


def _bits(values: torch.Tensor) -> Bits:
    bits: Bits = values.view(torch.int16).numpy().view(np.uint16)
    return bits
