"""Lazy tensors over small files, beside the plain tensors that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from expo_serve.checkpoint.folder import open_checkpoint
from expo_serve.checkpoint.records import Operand
from expo_serve.config import ExpoConfig, Method, Source
from expo_serve.load.counts import Counts
from expo_serve.load.lazy import LazyTensor, lazy_tensor
from expo_serve.load.reader import Reader
from expo_serve.load.session import LoadSession
from expo_serve.load.threads import Executor, run_inline
from expo_serve.plan.pair import plan_pair
from expo_serve.plan.plan import Plan
from tests.models.raw import write_raw
from tests.models.reference import extrapolate

NAME = "model.embed_tokens.weight"


@dataclass(frozen=True, repr=False)
class Case:
    """One planned tensor: lazily, and as it must come out."""

    lazy: LazyTensor
    expected: torch.Tensor
    counts: Counts


class Lazies:
    """Makes lazy tensors whose operands lie in files of ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = 0

    def make(
        self,
        base: torch.Tensor,
        aligned: torch.Tensor,
        alpha: float = 0.5,
        run: Executor = run_inline,
        rounding: Method = "nearest",
    ) -> Case:
        """A tensor of these two sides; more rows on the aligned side are a grown vocabulary."""
        plan = self.plan({NAME: base}, {NAME: aligned}, alpha, rounding)
        counts = Counts()
        lazy = lazy_tensor(plan.tensors[NAME], LoadSession(Reader(), counts, run))
        name = NAME if rounding == "dithered" else None
        return Case(lazy, extrapolate(base, aligned, alpha, name), counts)

    def plan(
        self,
        base: dict[str, torch.Tensor],
        aligned: dict[str, torch.Tensor],
        alpha: float = 0.5,
        rounding: Method = "nearest",
    ) -> Plan:
        """The plan of two sets of tensors."""
        self._made += 1
        opened = []
        pair: dict[Operand, dict[str, torch.Tensor]] = {"base": base, "aligned": aligned}
        for operand, tensors in pair.items():
            folder = write_raw(self._folder / str(self._made) / operand, tensors)
            opened.append(open_checkpoint(operand, Source(name=operand, path=str(folder))))
        return plan_pair(opened[0], opened[1], ExpoConfig(base="b", alpha=alpha, rounding=rounding))


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
