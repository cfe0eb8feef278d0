"""A device on the CPU that is as late as it may be: two streams, whose work is done when somebody has to wait for it.

Work waits in its stream until a wait, or the model's next operation, forces it; or, with a seed, until chance lets some
of it be done, in any order that the events between the streams allow. Memory that has been copied from is poisoned, and
memory that is allocated was the model's until now. So whoever reads or writes too early, or forgets a wait, is found
out by wrong bits.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from expo_serve.load.device_queue import Mark, Queue
from expo_serve.load.lazy import LazyTensor
from expo_serve.load.stages import Stages
from expo_serve.load.torch_internals import without_modes

POISON = 0xFF
"""NaN, in any dtype of floating point."""
CPU = torch.device("cpu")


@dataclass(eq=False)
class _Item:
    """Work in a stream; it is the mark of its own end."""

    simulator: Simulator
    stream: deque[_Item]
    work: Callable[[], None]
    after: Sequence[_Item]
    is_done: bool = False

    def wait(self) -> None:
        """Do what has to be done before, then this."""
        with self.simulator.lock:
            while not self.is_done:
                self.simulator.do_first(self.stream)

    def is_passed(self) -> bool:
        """Return whether it has been done."""
        return self.is_done


@dataclass
class Simulator:
    """A :class:`~expo_serve.load.device_queue.Queue` whose device is the CPU.

    Args:
        seed: of chance; None is as late as possible.
        total: the device's memory in bytes.
    """

    seed: int | None = None
    total: int = 1 << 40
    device: torch.device = CPU
    allocated: int = 0
    """Bytes of the device."""
    uploaded: int = 0
    """Bytes that were copied."""
    calls: list[str] = field(default_factory=list)
    works: list[Callable[[], None]] = field(default_factory=list)
    """All that was given to the model's stream."""
    copies_run_ahead: bool = False
    """Whether copies are done as soon as they may be: the model's stream is late alone then."""

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self._chance = random.Random(self.seed) if self.seed is not None else None
        self._copies: deque[_Item] = deque()
        self._model: deque[_Item] = deque()

    def host_memory(self, size: int) -> torch.Tensor:
        """Return poisoned memory."""
        return torch.full((size,), POISON, dtype=torch.uint8, device="cpu")

    def device_memory(self, size: int) -> torch.Tensor:
        """Return memory that the model has freed, and that its stream writes to later."""
        self.allocated += size
        memory = self.host_memory(size)
        self._enqueue("earlier", self._model, partial(_poison, memory), [])
        return memory

    def total_memory(self) -> int:
        """Return what there is."""
        return self.total

    def upload(self, dest: torch.Tensor, source: torch.Tensor, after: Sequence[Mark]) -> Mark:
        """Enqueue a copy."""
        self.uploaded += dest.numel()

        def work() -> None:
            dest.copy_(source)
            source.fill_(POISON)

        return self._enqueue("upload", self._copies, work, after)

    def run(self, work: Callable[[], None], after: Sequence[Mark]) -> Mark:
        """Enqueue work of the model's stream."""
        self.works.append(work)
        return self._enqueue("run", self._model, work, after)

    def _enqueue(self, name: str, stream: deque[_Item], work: Callable[[], None], after: Sequence[Mark]) -> Mark:
        with self.lock:
            self.calls.append(name)
            item = _Item(self, stream, work, [mark for mark in after if isinstance(mark, _Item)])
            stream.append(item)
            self._do_some()
        return item

    def _do_some(self) -> None:
        while self.copies_run_ahead and self._copies and _is_ready(self._copies[0]):
            self.do_first(self._copies)
        while self._chance and self._chance.random() < 0.5:
            ready = [stream for stream in (self._copies, self._model) if stream and _is_ready(stream[0])]
            if not ready:
                return
            self.do_first(self._chance.choice(ready))

    def do_first(self, stream: deque[_Item]) -> None:
        """Do the first work of a stream, after what that waits for."""
        first = stream[0]
        for other in first.after:
            other.wait()
        if stream and stream[0] is first:  # what it waited for may have waited for it
            stream.popleft()
            with without_modes():
                first.work()
            first.is_done = True

    def model_goes_on(self) -> None:
        """Do what was enqueued on the model's stream: what the model does now comes after it."""
        with self.lock:
            while self._model:
                self.do_first(self._model)

    @contextmanager
    def model(self) -> Iterator[None]:
        """Let every operation of the calling thread be one of the model's stream, as on a device."""
        with _InOrder(self):
            yield

    def stages(self, **options: Any) -> Stages:
        """Return stages that take every copy to this device, also copies to the CPU."""
        queue: Queue = self
        return Stages(queue_of=lambda _: queue, **options)


def _poison(memory: torch.Tensor) -> None:
    memory.fill_(POISON)


def _is_ready(item: _Item) -> bool:
    return all(other.is_done for other in item.after)


class _InOrder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Does the work of the model's stream before the model's own operations."""

    def __init__(self, simulator: Simulator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._simulator = simulator

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        is_lazy_copy = func is torch.ops.aten.copy_.default and isinstance(args[1], LazyTensor)
        if not func.is_view and not is_lazy_copy:
            self._simulator.model_goes_on()
        return func(*args, **(kwargs or {}))
