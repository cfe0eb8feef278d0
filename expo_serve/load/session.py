"""One load: what its lazy tensors share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from expo_serve.load.counts import Counts, ReadActivity
from expo_serve.load.device import Stages
from expo_serve.load.operands import Recipe
from expo_serve.load.read_ahead import ReadAhead
from expo_serve.load.reader import Reader
from expo_serve.load.selection import Selection
from expo_serve.load.threads import Background, Executor, run_inline


class Observer(Protocol):
    """Looks at what a load computes; :class:`~expo_serve.measure.sample.Sample` is one."""

    def __call__(self, recipe: Recipe, block: Selection, reader: Reader) -> None:
        """Look at a block that is done, in whatever thread did it.

        Args:
            recipe: how the block was computed.
            block: its elements.
            reader: reads its operands again.
        """


@dataclass(frozen=True)
class LoadSession:
    """What all lazy tensors of one load share. By itself it copies in the calling thread and stages nothing."""

    reader: Reader = field(default_factory=Reader)
    counts: Counts = field(default_factory=Counts)
    submit: Executor = run_inline
    """Runs the blocks of a copy."""
    stages: Stages = field(default_factory=Stages)
    """The ways onto devices; outside of their context results are made on the host and copied."""
    observe: Observer | None = None


@dataclass(frozen=True)
class ModelSession(LoadSession):
    """A load into one model, by threads and onto devices, while :func:`load_into` is entered."""

    background: Background | None = None

    def settle(self) -> None:
        """Wait until all that was submitted is written, also for work given to a device from now on.

        Raises:
            ExpoError: a file cannot be read, or a value is not finite.
        """
        if self.background:
            self.background.wait()
        self.stages.wait()


@contextmanager
def load_into(
    model: torch.nn.Module, threads: int, activity: ReadActivity | None = None, observe: Observer | None = None
) -> Iterator[ModelSession]:
    """Open a session for one model.

    After the context, copies run in the calling thread: layers that vLLM quantises late copy from their lazy tensors
    then, and nobody would wait for a thread.

    Args:
        model: the model whose parameters are written.
        threads: that read and combine.
        activity: records what the reads are doing.
        observe: is called with every block that is computed.
    """
    activity = activity or ReadActivity()
    with Background(model, threads, ReadAhead(activity)) as background, Stages(threads) as stages:
        yield ModelSession(Reader(activity), Counts(), background.submit, stages, observe, background)
