"""Packed deltas of small pairs, made as the command makes them, and loads of them beside the pair's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from expo_serve.checkpoint.folder import Checkpoint, open_checkpoint
from expo_serve.checkpoint.records import Operand
from expo_serve.cli import delta
from expo_serve.config import ExpoConfig, Source
from expo_serve.errors import ValuesError
from expo_serve.load.counts import Counts
from expo_serve.load.dtypes import meta_tensor
from expo_serve.load.lazy import LazyTensor, lazy_tensor
from expo_serve.load.reader import Reader
from expo_serve.load.session import LoadSession
from expo_serve.plan import packed_format as packed_format_module
from expo_serve.plan.delta import open_delta
from expo_serve.plan.pair import plan_pair
from expo_serve.plan.plan import Plan
from expo_serve.write import packed as packing_module
from tests.load.lazies import numbers
from tests.models.raw import same_bits, write_raw

EMBED, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
NEW, IDS, SAME = "model.new.weight", "ids", "model.norm.weight"
SMALL_BLOCK = 64
ALPHA = 0.5
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Pack:
    """A pair in files, and its packed delta."""

    base: Path
    aligned: Path
    delta: Path
    unmatched: str

    @property
    def file(self) -> Path:
        """The delta's one file."""
        return self.delta / "delta.safetensors"

    def open_base(self) -> Checkpoint:
        """Base, its headers read."""
        return _open("base", self.base)

    def by_pair(self, alpha: float) -> Plan:
        """The plan without the delta."""
        config = ExpoConfig.model_validate({"base": "b", "alpha": alpha, "unmatched": self.unmatched})
        return plan_pair(self.open_base(), _open("aligned", self.aligned), config)

    def by_delta(self, alpha: float, rules: tuple[str, ...] = (), **options: Any) -> Plan:
        """The plan of base and the delta."""
        given = {"base": "b", "delta": "d", "alpha": alpha, "alpha_rules": rules, **options}
        config = ExpoConfig.model_validate(given)
        return open_delta(Source(name="delta", path=str(self.delta))).plan(self.open_base(), config)

    def lazy(self, name: str, alpha: float = 0.5, counts: Counts | None = None) -> LazyTensor:
        """One tensor of the delta's."""
        return lazy_tensor(self.by_delta(alpha).tensors[name], LoadSession(Reader(), counts or Counts()))

    def expected(self, name: str, alpha: float = 0.5) -> torch.Tensor:
        """The same one of the pair's, with its values."""
        return lazy_tensor(self.by_pair(alpha).tensors[name], LoadSession(Reader(), Counts())).materialize()


class Packs:
    """Makes them in folders of ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, count()

    def make(self, base: Tensors, aligned: Tensors, unmatched: str = "refuse", **configs: Any) -> Pack:
        """Write two checkpoints and pack them; ``base_config`` and ``aligned_config`` change their configs."""
        folder = self._folder / str(next(self._numbers))
        sides = [
            write_raw(folder / side, tensors, **configs.get(f"{side}_config", {}))
            for side, tensors in (("base", base), ("aligned", aligned))
        ]
        pack = Pack(sides[0], sides[1], folder / "delta", unmatched)
        create(pack)
        return pack


def create(pack: Pack) -> None:
    """Run the command in this process."""
    sources = ["--base", str(pack.base), "--aligned", str(pack.aligned)]
    assert delta.main(["create", *sources, "--unmatched", pack.unmatched, "--out", str(pack.delta)]) == 0


def tensors_of_each_coding() -> tuple[Tensors, Tensors]:
    """Changes with large steps and without, whole and shuffled, raw, the same, grown, of another dtype."""
    base = {UP: numbers(20, 7), EMBED: numbers(8, 9, seed=1), SAME: numbers(70, seed=2), IDS: torch.arange(9)}
    aligned = {name: tensor.clone() for name, tensor in base.items()}
    aligned[UP].view(torch.int16)[::5, ::3] += 3
    aligned[UP][3, 3] = -0.5
    aligned[EMBED] = torch.cat([aligned[EMBED] + 1, torch.zeros(7, 9).bfloat16()])
    aligned[NEW] = numbers(3, 9, seed=4)
    base[SAME] = base[SAME].float()
    aligned[IDS] = torch.arange(9) * 3
    return base, aligned


@contextmanager
def blocks_of(values: int) -> Iterator[None]:
    """Deltas that are made within have blocks of so many values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "BLOCK", values)
        patch.setattr(packed_format_module, "BLOCK", values)
        yield


def outcomes(plan: Plan) -> dict[str, torch.Tensor | str]:
    """For each tensor its values, copied into a parameter of its dtype and shape, or that they are not finite."""
    reader, counts = Reader(), Counts()
    found: dict[str, torch.Tensor | str] = {}
    for name, planned in plan.tensors.items():
        parameter = torch.empty(planned.result.shape, dtype=meta_tensor(planned.result).dtype)
        try:
            session = LoadSession(reader, counts)
            found[name] = parameter.copy_(lazy_tensor(planned, session))
            session.stages.wait()
        except ValuesError:
            found[name] = "not finite"
    return found


def assert_same_outcomes(found: dict[str, torch.Tensor | str], expected: dict[str, torch.Tensor | str]) -> None:
    """All names, all bits, all errors."""
    assert found.keys() == expected.keys()
    assert [name for name in expected if not _same(found[name], expected[name])] == []


def _same(one: torch.Tensor | str, other: torch.Tensor | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and one == other
    return same_bits(one, other)


def _open(operand: Operand, folder: Path) -> Checkpoint:
    return open_checkpoint(operand, Source(name=operand, path=str(folder)))
