"""Copies that go on in threads while the model's ``load_weights`` goes on in its own.

Walking a model and slicing its parameters is Python's work; reading and combining bytes is not, and holds no lock. So
``copy_`` of a lazy tensor only hands its blocks over, in the checkpoint's order, and the threads read ahead of whoever
waits for them. Whoever looks at a parameter must wait first (:meth:`Background.wait`): while a model loads,
:class:`~expo_serve.load.coverage.WriteTracker` sees every operation and does that.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Protocol

import torch

from expo_serve.load.activity import ReadActivity
from expo_serve.load.read_ahead import FileSpan, ReadAhead
from expo_serve.load.selection import span
from expo_serve.load.threads import default_threads, leave_core, start

PENDING_BYTES = 256 << 20
"""How much may be handed over and not done. It costs no memory; it keeps an error near its cause."""
_JOIN_SECONDS = 5.0

Task = Callable[[], None]


class Executor(Protocol):
    """Does a task that writes into a tensor, now or soon."""

    def __call__(self, dest: torch.Tensor, task: Task, ranges: Sequence[FileSpan] = ()) -> None:
        """Do ``task``, which writes into ``dest`` only and reads these bytes of files."""


def run_inline(dest: torch.Tensor, task: Task, ranges: Sequence[FileSpan] = ()) -> None:
    """The plainest :class:`Executor`."""
    task()


@dataclass(slots=True)
class _Handed:
    """One task, and the addresses between which it writes."""

    start: int
    end: int
    task: Task
    failure: BaseException | None = None


class Background:
    """Runs tasks that write into a model's parameters, in threads between entering and leaving the context.

    Two tasks that may write to the same place run in the order in which they came. A task runs at once where no
    thread can help or nobody would wait: outside of the context, with one thread only, for tensors that are not on
    the CPU or no parameter's.

    Args:
        model: whose parameters are written.
        threads: how many; by default as many as help on this machine.
        activity: where those that read ahead say what they are doing.
    """

    def __init__(
        self, model: torch.nn.Module, threads: int | None = None, activity: ReadActivity | None = None
    ) -> None:
        self._storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._wanted = default_threads() if threads is None else threads
        self._threads: list[threading.Thread] = []
        self._todo: SimpleQueue[_Handed | None] = SimpleQueue()
        self._done: SimpleQueue[_Handed] = SimpleQueue()
        self._pending: list[tuple[int, int]] = []
        """What is being written: from and to, sorted; no two overlap."""
        self._pending_bytes = 0
        self._ahead = ReadAhead(activity or ReadActivity())
        self._failure: BaseException | None = None
        self._ended = False

    def __enter__(self) -> Background:
        if self._wanted > 1:
            started = (start(f"expo-{number}", self._work) for number in range(self._wanted))
            self._threads = [thread for thread in started if thread]  # where some are refused, the others do it
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._ahead.close()
        for _thread in self._threads:
            self._todo.put(None)
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._threads = []

    def run(self, dest: torch.Tensor, task: Task, ranges: Sequence[FileSpan] = ()) -> None:
        """Do ``task``, which writes into ``dest`` only and reads these bytes of files, now or soon.

        Raises:
            BaseException: what this task, or one handed over before, has raised.
        """
        if not self._threads or dest.device.type != "cpu" or dest.untyped_storage().data_ptr() not in self._storages:
            with self._keeping_failure():
                task()
            return
        first = dest.data_ptr()
        end = first + span(tuple(dest.shape), dest.stride()) * dest.element_size()
        if self._is_being_written(first, end):
            self.wait()
        while self._pending and self._pending_bytes + end - first > PENDING_BYTES:
            self._finish_one()
        with self._keeping_failure():
            self._ahead.bring(ranges, partial(self._todo.put, _Handed(first, end, task)))
            insort(self._pending, (first, end))
            self._pending_bytes += end - first

    def wait(self) -> None:
        """Wait until all that was handed over is written.

        Raises:
            BaseException: what the first task that failed has raised.
        """
        while self._pending:
            self._finish_one()
        if self._failure:
            raise self._failure

    def _is_being_written(self, start: int, end: int) -> bool:
        """Of the tasks that begin before ``end``, the last one reaches farthest, since no two overlap."""
        index = bisect_left(self._pending, (end,))
        return index > 0 and self._pending[index - 1][1] > start

    def _finish_one(self) -> None:
        if self._failure:
            raise self._failure
        done = self._done.get()
        self._pending.remove((done.start, done.end))
        self._pending_bytes -= done.end - done.start
        self._failure = self._failure or done.failure
        if self._failure:
            raise self._failure

    @contextmanager
    def _keeping_failure(self) -> Iterator[None]:
        """A failure stays until the end: whoever catches it on its way may not know what it means."""
        try:
            yield
        except BaseException as error:
            self._failure = self._failure or (None if self._ended else error)
            raise

    def _work(self) -> None:
        leave_core()
        while (handed := self._todo.get()) is not None:
            try:
                if not self._ended and not self._failure:
                    handed.task()
            except BaseException as error:  # noqa: BLE001 - whoever waits raises it
                handed.failure = error
            self._done.put(handed)
