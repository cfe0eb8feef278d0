"""Writes that go on in threads while the model's ``load_weights`` goes on in its own.

Walking a model and slicing its parameters is Python's work; combining bytes is not, and holds no lock. So
``copy_`` of a lazy tensor only hands its pieces over. Whoever looks at a parameter must wait first
(:meth:`Background.wait`): while a model loads, :class:`~expo_serve.weights.coverage.WriteTracker` sees every
operation and does that.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch

MAX_THREADS = 4
"""More do not help: a few cores fill the memory's bandwidth."""
_MAX_PENDING = 64


Task = Callable[[], None]
Run = Callable[[torch.Tensor, Task], None]
"""Does a task that writes into a tensor, now or soon."""


def run_now(dest: torch.Tensor, task: Task) -> None:
    """The plainest :data:`Run`."""
    task()


class Background:
    """Runs tasks that write into a model's parameters, in threads between entering and leaving the context.

    Two tasks that may write to the same place run in the order in which they came. A task runs at once where no
    thread can help or nobody would wait: outside of the context, on a machine with one core, for tensors that are
    not on the CPU or no parameter's.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[tuple[int, int, Future[None]]] = deque()
        self._failure: BaseException | None = None

    def __enter__(self) -> Background:
        threads = min(MAX_THREADS, os.cpu_count() or 1)
        if threads > 1:
            self._pool = ThreadPoolExecutor(threads, "expo-write", initializer=_leave_core)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None
        self._pending.clear()

    def run(self, dest: torch.Tensor, task: Task) -> None:
        """Do ``task``, which writes into ``dest`` only, now or soon.

        Raises:
            Exception: what this task, or one handed over before, has raised.
        """
        if not self._pool or dest.device.type != "cpu" or dest.untyped_storage().data_ptr() not in self._storages:
            task()
            return
        start, end = _extent(dest)
        if any(start < other_end and other_start < end for other_start, other_end, _ in self._pending):
            self.wait()
        while len(self._pending) >= _MAX_PENDING:
            self._finish_one()
        self._pending.append((start, end, self._pool.submit(task)))

    def wait(self) -> None:
        """Wait until all that was handed over is written.

        Raises:
            Exception: what the first task that failed has raised.
        """
        while self._pending:
            self._finish_one()
        if self._failure:
            raise self._failure

    def _finish_one(self) -> None:
        """A failure stays: whoever catches it on its way may not know what it means."""
        failure = self._pending.popleft()[2].exception()
        self._failure = self._failure or failure
        if self._failure:
            raise self._failure


def span(tensor: torch.Tensor) -> int:
    """Elements of the storage from a tensor's first to its last; 0 for a tensor without any."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum(int((size - 1) * stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses between which a tensor's elements lie."""
    return tensor.data_ptr(), int(tensor.data_ptr() + span(tensor) * tensor.element_size())


def _leave_core() -> None:
    """vLLM's CPU worker is pinned to its cores, often one; the threads of a load may use the others meanwhile."""
    with suppress(AttributeError, OSError):  # not Linux, or not allowed
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # this thread's; the kernel keeps to the cgroup's set
