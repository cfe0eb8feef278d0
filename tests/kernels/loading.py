"""What a process of its own does to show whether loops can be compiled in it: copy a lazy tensor."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from expo_serve import kernels
from expo_serve.load.fill import compile_kernels
from tests.load.lazies import Lazies, numbers
from tests.models.reference import extrapolate


def load() -> None:
    """Copy, and print who did the work, whether its bits are right, why no loops are used, and hits in their cache."""
    with tempfile.TemporaryDirectory() as folder:
        base, aligned = numbers(40, 50), numbers(40, 50, seed=1)
        case = Lazies(Path(folder)).make(base, aligned)
        found = torch.empty(40, 50, dtype=torch.bfloat16).copy_(case.lazy)
    is_right = torch.equal(found.view(torch.int16), extrapolate(base, aligned, 0.5).view(torch.int16))
    print("loops" if kernels.available() else "torch")
    print("right" if is_right else "wrong")
    print(compile_kernels(None))
    print(_cache_hits())


def _cache_hits() -> int:
    if not kernels.available():
        return 0
    from expo_serve.kernels import bf16

    return sum(bf16.combine.stats.cache_hits.values())  # type: ignore[attr-defined]
