"""One load: what its lazy tensors share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from expo_serve.load.counts import Counts, ReadActivity
from expo_serve.load.device_queue import Mark
from expo_serve.load.operands import Recipe
from expo_serve.load.read_ahead import ReadAhead
from expo_serve.load.reader import Reader
from expo_serve.load.selection import Selection
from expo_serve.load.stages import Stages
from expo_serve.load.threads import Background, Executor, run_inline


class Written(NamedTuple):
    """What was computed on a device, once its stream has come so far."""

    values: torch.Tensor
    """Of the shape of the block, there: cast, where the parameter has another dtype."""
    run: Callable[[Callable[[], None]], Mark]
    """Enqueues work behind what writes them."""


class Observer(Protocol):
    """Looks at what a load computes; :class:`~expo_serve.measure.sample.Sample` is one."""

    def __call__(self, recipe: Recipe, block: Selection, reader: Reader, written: Written | None) -> None:
        """Look at a block that is done, in whatever thread did it.

        Args:
            recipe: how the block was computed.
            block: its elements.
            reader: reads its operands again.
            written: the result, where a device has computed it.
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

    def account(self, recipe: Recipe, block: Selection, written: Written | None = None) -> None:
        """Count what was read for a block that is done, and let the observer look at it."""
        if self.observe:
            self.observe(recipe, block, self.reader, written)
        for source, count in recipe.operands.read_bytes(block).items():
            self.counts.add_read(source, count)


@dataclass(frozen=True)
class ModelSession(LoadSession):
    """A load into one model, by threads and onto devices, while :func:`load_into` is entered."""

    background: Background | None = None

    def settle_for(self, tensors: Iterable[torch.Tensor]) -> None:
        """Wait until what threads write to these tensors is written; a device keeps the order by itself.

        Raises:
            ExpoError: a file cannot be read, or a value is not finite.
        """
        if self.background:
            self.background.wait_for(tensors)

    def settle_memory(self) -> None:
        """Wait until all that threads write to memory is written; a device keeps the order by itself.

        Raises:
            ExpoError: a file cannot be read, or a value is not finite.
        """
        if self.background:
            self.background.wait()

    def settle(self) -> None:
        """Wait until all that was submitted is written, and all values have been looked at.

        Raises:
            ExpoError: a file cannot be read, or a value is not finite.
        """
        self.settle_memory()
        self.stages.wait()


def stages_for(threads: int, activity: ReadActivity | None = None) -> Stages:
    """Return the stages of a load, to be entered.

    Args:
        threads: that read for each device.
        activity: records what the reads are doing.
    """
    return Stages(threads, ReadAhead(activity or ReadActivity(), on_all_cores=False))


@contextmanager
def load_into(
    model: torch.nn.Module,
    threads: int,
    activity: ReadActivity | None = None,
    observe: Observer | None = None,
    stages: Stages | None = None,
) -> Iterator[ModelSession]:
    """Open a session for one model.

    After the context, copies on the CPU run in the calling thread: layers that vLLM quantises late copy from their lazy
    tensors then, and nobody would wait for a thread. A device keeps the order by itself, so its stages may stay open.

    Args:
        model: the model whose parameters are written.
        threads: that read and combine.
        activity: records what the reads are doing.
        observe: is called with every block that is computed.
        stages: open ones; by default those of this context.
    """
    activity = activity or ReadActivity()
    with ExitStack() as opened, Background(model, threads, ReadAhead(activity)) as background:
        stages = stages or opened.enter_context(stages_for(threads, activity))
        yield ModelSession(Reader(activity), Counts(), background.submit, stages, observe, background)
