"""Loads onto a simulated device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

import pytest
import torch

from expo_serve.errors import ExpoError
from expo_serve.load.counts import Counts
from expo_serve.load.lazy import LazyTensor, lazy_tensor
from expo_serve.load.reader import Reader
from expo_serve.load.session import LoadSession
from expo_serve.load.stage import Stage
from expo_serve.load.stages import Stages
from expo_serve.plan.plan import PlannedTensor
from tests.load.simulator import Simulator


class Rig:
    """Stages onto a simulated device, and a session that copies that way."""

    def __init__(self, stages: Stages, simulator: Simulator) -> None:
        self.stages, self.simulator = stages, simulator
        self.session = LoadSession(Reader(), Counts(), stages=stages)

    def lazy(self, planned: PlannedTensor) -> LazyTensor:
        """The tensor, for copies onto the device."""
        return lazy_tensor(planned, self.session)

    def copied(self, lazy: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What the model finds after a copy."""
        dest = torch.full(lazy.shape, 7, dtype=dtype or lazy.dtype)
        with self.simulator.model():
            dest.copy_(lazy)
            found = dest.clone()
        self.stages.wait()
        return found


@contextmanager
def rig(seed: int | None = None, stage_bytes: int = 256, turns: int = 3) -> Iterator[Rig]:
    """A rig whose threads end."""
    simulator = Simulator(seed)
    with simulator.stages(threads=2, stage_bytes=stage_bytes, turns=turns) as stages:
        yield Rig(stages, simulator)


@contextmanager
def all_onto_a_device(seed: int | None = None) -> Iterator[Simulator]:
    """Let every copy out of a lazy tensor, of whatever session, go onto a simulated device."""
    simulator = Simulator(seed)
    with (
        simulator.stages(threads=2, stage_bytes=1 << 12, turns=4) as stages,
        pytest.MonkeyPatch.context() as patch,
        simulator.model(),
    ):
        thread, new, wait = get_ident(), Stages.onto, Stages.wait
        failed: list[Stage] = []

        def onto(_: Stages, device: torch.device) -> Stage | None:
            return new(stages, device) if device.type == "cpu" and get_ident() == thread else None

        def wait_and_forget(_: Stages) -> None:
            """A failure ends a load; the test goes on with another stage."""
            try:
                wait(stages)
            except ExpoError:
                failed.extend(stage for stage in stages._stages.values() if stage)
                stages._stages.clear()
                raise

        patch.setattr(Stages, "onto", onto)
        patch.setattr(Stages, "wait", wait_and_forget)
        yield simulator
        for stage in failed:
            stage.close()
