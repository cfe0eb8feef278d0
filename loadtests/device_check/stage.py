"""How the checks take hold of the way onto a device: the one place that knows the classes behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from expo_serve.load import sizes, stage
from expo_serve.load.counts import ReadActivity
from expo_serve.load.lazy import LazyTensor, lazy_tensor
from expo_serve.load.read_ahead import ReadAhead
from expo_serve.load.session import ModelSession, load_into
from expo_serve.load.stages import Stages
from expo_serve.load.threads import device_threads
from expo_serve.load.transfer import Transfer
from expo_serve.plan.plan import Plan


@dataclass(frozen=True)
class Choice:
    """How the stage is cut; None is the loader's own choice."""

    piece_bytes: int | None = None
    turns: int | None = None
    threads: int | None = None

    def described(self) -> dict[str, int]:
        """The numbers that are meant."""
        return {
            "piece_bytes": self.piece_bytes or sizes.STAGE_BYTES,
            "turns": self.turns or sizes.STAGE_TURNS,
            "threads": self.threads or device_threads(),
        }


USUAL = Choice()
SMALL = Choice(piece_bytes=1 << 18, turns=3)
"""Many pieces even of a small tensor: every buffer is used again and again."""


@contextmanager
def session_into(parameters: Mapping[str, torch.Tensor], choice: Choice = USUAL) -> Iterator[ModelSession]:
    """A load into these parameters, as the loader opens it; all is written when the context ends without an error."""
    cut = choice.described()
    ahead = ReadAhead(ReadActivity(), on_all_cores=False)
    with (
        Stages(cut["threads"], ahead, stage_bytes=cut["piece_bytes"], turns=cut["turns"]) as stages,
        load_into(holder(parameters), cut["threads"], stages=stages) as session,
    ):
        yield session
        session.settle()


@contextmanager
def counted_ways() -> Iterator[Counter[str]]:
    """Count the pieces by what they take onto the device: a delta may be computed there, or by the host."""
    ways: Counter[str] = Counter()
    choose = stage._transfer_of

    def note(*arguments: Any) -> Transfer:
        chosen = choose(*arguments)
        ways[type(chosen).__name__] += 1
        return chosen

    with patch.object(stage, "_transfer_of", note):
        yield ways


def walk(plan: Plan, names: Iterable[str], session: ModelSession) -> Iterator[tuple[str, LazyTensor]]:
    """The tensors, given one after the other as the loader does: what comes next is read ahead."""
    tensors = {name: lazy(plan, name, session) for name in names}
    for tensor in tensors.values():
        session.stages.announce(tensor.pending)
    for name, tensor in tensors.items():
        yield name, tensor
        session.stages.finish(tensor.pending)


def lazy(plan: Plan, name: str, session: ModelSession) -> LazyTensor:
    """One tensor of the plan, as the loader yields it."""
    return lazy_tensor(plan.tensors[name], session)


def holder(parameters: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A model that has nothing but these parameters."""
    model = torch.nn.Module()
    for name, values in parameters.items():
        model.register_parameter(name.replace(".", "-"), torch.nn.Parameter(values, requires_grad=False))
    return model
