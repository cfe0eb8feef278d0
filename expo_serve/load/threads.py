"""The one pool of threads under everything that needs threads, and two ways to use it.

:class:`Background` writes into a model's parameters while the model's ``load_weights`` goes on; :func:`in_order`
yields results in the order of their inputs. ``concurrent.futures.ThreadPoolExecutor`` would not do: its threads are
joined when the interpreter exits, so a read that hangs on a dead network mount would keep a failed process alive.
"""

from __future__ import annotations

import math
import os
import threading
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from expo_serve.load import sizes
from expo_serve.load.selection import FileSpan, span

MAX_THREADS = 4
"""More do not help where the page cache or a local disk is read: a few cores fill the memory's bandwidth."""
NETWORK_THREADS = 8
"""More reads have to be under way where each is a round trip; each thread holds two pieces of memory."""
_DEVICE_THREADS = 2, 8
"""At least and at most: a core copies some 7 GB/s out of the page cache, and a link takes 25 to 55 GB/s."""
_RESULTS_AHEAD = 2
"""Results of :func:`in_order` that wait for their turn, for each thread."""
LOOK_SECONDS = 1.0
"""How often a wait looks for signals."""
JOIN_SECONDS = 5.0
"""For threads to end: a read that hangs on a dead network mount must not hold up the end of a process."""

Task = Callable[[], object]
Item = TypeVar("Item")
Result = TypeVar("Result")


def default_threads(on_network: bool = False) -> int:
    """Return how many threads load best: one a core up to a few, and more where reads are round trips."""
    return NETWORK_THREADS if on_network else min(MAX_THREADS, os.cpu_count() or 1)


def device_threads(on_network: bool = False, ranks: int = 1) -> int:
    """Return how many threads read best for a device: its link takes what several cores copy.

    Args:
        on_network: whether reads are round trips.
        ranks: processes of this machine that load at the same time.
    """
    least, most = _DEVICE_THREADS
    return most if on_network else min(most, max(least, all_cores() // max(1, ranks) - 1))


def all_cores() -> int:
    """Return the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


@runtime_checkable
class Joinable(Protocol):
    """A task that can do the work of several of its kind at once."""

    def __call__(self) -> object:
        """Do the work."""

    def call_together(self, others: Sequence[Any]) -> None:
        """Do the work, and that of others of the kind."""


class Executor(Protocol):
    """Runs a task that writes into a tensor, now or later."""

    def __call__(self, dest: torch.Tensor, task: Task, spans: Sequence[FileSpan] = ()) -> None:
        """Run ``task``, which writes into ``dest`` only and reads these spans of files."""


def run_inline(dest: torch.Tensor, task: Task, spans: Sequence[FileSpan] = ()) -> None:
    """Run the task at once, in the calling thread."""
    task()


class Prefetch(Protocol):
    """Brings cold bytes into the page cache; :class:`~expo_serve.load.read_ahead.ReadAhead` is one."""

    def defer(self, spans: Sequence[FileSpan], then: Callable[[], None]) -> bool:
        """Call ``then`` from another thread once these spans are cached; False, without a call, if they are already."""

    def close(self, until: float | None = None) -> None:
        """Let the threads end, and wait for that, but not for long.

        Args:
            until: by the monotonic clock; the wait ends then, if it is not over before.
        """


class Background:
    """Runs tasks that write into a model's parameters in threads, between entering and leaving the context.

    Walking a model and slicing its parameters is Python's work and holds the GIL; reading and combining bytes does not.
    So ``copy_`` of a lazy tensor only submits its blocks, in the checkpoint's order. A caller that looks at a parameter
    must call :meth:`wait` first: while a model loads, :class:`~expo_serve.load.coverage.WriteTracker` sees every
    operation and does that.

    Two tasks that may write to the same place run in the order in which they were submitted. A task runs synchronously
    when it cannot be deferred safely: outside of the context, with a single thread, or when ``dest`` is not a CPU
    parameter of the model.

    Args:
        model: the model whose parameters are written.
        threads: how many; by default as many as help on this machine.
        prefetch: brings cold files into the page cache; without one, tasks read them.
    """

    def __init__(self, model: torch.nn.Module, threads: int | None = None, prefetch: Prefetch | None = None) -> None:
        self._storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._wanted = default_threads() if threads is None else threads
        self._pool: DaemonPool | None = None
        self._done: SimpleQueue[_Submitted] = SimpleQueue()
        self._pending: list[tuple[int, int]] = []
        """Address ranges that are being written: start and end, sorted; no two overlap."""
        self._pending_bytes = 0
        self._joined: list[_Submitted] = []
        """Small tasks that wait to be handed over together."""
        self._joined_bytes = 0
        self._prefetch = prefetch
        self._failure: BaseException | None = None
        self._ended = self._is_open = False

    def __enter__(self) -> Background:
        self._is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        self._ended, self._is_open = True, False
        until = time.monotonic() + JOIN_SECONDS
        if self._prefetch:
            self._prefetch.close(until)
        if self._pool:
            self._pool.close(until)
        self._pool = None

    def submit(self, dest: torch.Tensor, task: Task, spans: Sequence[FileSpan] = ()) -> None:
        """Run ``task``, which writes into ``dest`` only and reads these spans of files, now or soon.

        Raises:
            BaseException: whatever this task, or one submitted before, has raised.
        """
        if not self._is_deferrable(dest):
            with self._keeping_failure():
                task()
            return
        first = dest.data_ptr()
        end = first + span(tuple(dest.shape), dest.stride()) * dest.element_size()
        if self._is_being_written(first, end):
            self.wait()
        while self._pending and self._pending_bytes + end - first > sizes.PENDING_BYTES:
            self._finish_one()
        assert self._pool is not None
        submitted = _Submitted(self, first, end, task)
        with self._keeping_failure():
            if not (self._prefetch and self._prefetch.defer(spans, partial(self._pool.submit, submitted))):
                if end - first < sizes.JOINED_BYTES and isinstance(task, Joinable):
                    self._join(submitted)
                else:
                    self._pool.submit(submitted)
            insort(self._pending, (first, end))
            self._pending_bytes += end - first

    def _join(self, submitted: _Submitted) -> None:
        """Keep a small task until others are there, with which a thread does it."""
        self._joined.append(submitted)
        self._joined_bytes += submitted.end - submitted.start
        if self._joined_bytes >= sizes.JOINED_BYTES:
            self._hand_over_joined()

    def _hand_over_joined(self) -> None:
        if self._joined and self._pool is not None:
            self._pool.submit(partial(_run_together, self._joined))
        self._joined, self._joined_bytes = [], 0

    def wait(self) -> None:
        """Wait until all submitted tasks are done.

        Raises:
            BaseException: whatever the first failed task has raised.
        """
        while self._pending:
            self._finish_one()
        if self._failure:
            raise self._failure

    def wait_for(self, tensors: Iterable[torch.Tensor]) -> None:
        """Wait until all submitted tasks are done, if one of them may write to these tensors.

        Raises:
            BaseException: whatever the first failed task has raised.
        """
        if self._failure or (self._pending and any(self._may_be_written(tensor) for tensor in tensors)):
            self.wait()

    def _may_be_written(self, tensor: torch.Tensor) -> bool:
        if tensor.device.type != "cpu":
            return False
        storage = tensor.untyped_storage()
        return self._is_being_written(storage.data_ptr(), storage.data_ptr() + storage.nbytes())

    def _is_deferrable(self, dest: torch.Tensor) -> bool:
        if dest.device.type != "cpu" or dest.untyped_storage().data_ptr() not in self._storages:
            return False
        return self._has_threads()

    def _has_threads(self) -> bool:
        """Return True if there are threads; they are started when they are needed first."""
        if self._pool is None and self._is_open and self._wanted > 1:
            self._pool = DaemonPool(self._wanted, "expo")
        return self._pool is not None and self._pool.size > 0

    def _is_being_written(self, start: int, end: int) -> bool:
        """Of the ranges that begin before ``end``, the last one reaches farthest, since no two overlap."""
        index = bisect_left(self._pending, (end,))
        return index > 0 and self._pending[index - 1][1] > start

    def _finish_one(self) -> None:
        if self._failure:
            raise self._failure
        self._hand_over_joined()
        done = self._next_done()
        self._pending.remove((done.start, done.end))
        self._pending_bytes -= done.end - done.start
        self._failure = self._failure or done.failure
        if self._failure:
            raise self._failure

    def _next_done(self) -> _Submitted:
        """Wait for a task, but not without end: a signal that comes just before a wait is looked at after it only."""
        while True:
            with suppress(Empty):
                return self._done.get(timeout=LOOK_SECONDS)

    @contextmanager
    def _keeping_failure(self) -> Iterator[None]:
        """Keep a failure until the end: a caller that catches it on its way may not know what it means."""
        try:
            yield
        except BaseException as error:
            self._failure = self._failure or (None if self._ended else error)
            raise


@dataclass(slots=True)
class _Submitted:
    """One task of a :class:`Background`, and the addresses between which it writes."""

    background: Background
    start: int
    end: int
    task: Task
    failure: BaseException | None = None

    def __call__(self) -> None:
        background = self.background
        try:
            if not background._ended and not background._failure:
                self.task()
        except BaseException as error:  # noqa: BLE001 - the caller of submit or wait raises it
            self.failure = error
        background._done.put(self)


def _run_together(group: Sequence[_Submitted]) -> None:
    """Run joined tasks at once; a failure of one is noted with the first."""
    first, *others = group
    background = first.background
    try:
        if not background._ended and not background._failure:
            first.task.call_together([other.task for other in others])  # type: ignore[attr-defined]  # joinable
    except BaseException as error:  # noqa: BLE001 - the caller of submit or wait raises it
        first.failure = error
    for one in group:
        background._done.put(one)


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None
) -> Iterator[tuple[Item, Result]]:
    """Do the work of each item in a thread; yield items and results in the order of the items.

    Args:
        work: called in a thread.
        items: taken as they are needed.
        threads: how many; by default one for each core. At most twice as many results and one are in memory.

    Raises:
        BaseException: whatever the work has raised; what is under way is waited for, for a few seconds.
    """
    threads = threads or all_cores()
    pool = DaemonPool(threads, "expo-work")
    pending: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.future(partial(work, item))))
            if len(pending) > _RESULTS_AHEAD * threads:
                item, future = pending.popleft()
                yield item, future.result()
        while pending:
            item, future = pending.popleft()
            yield item, future.result()
    finally:
        for _, future in pending:
            future.cancel()
        pool.close()


class DaemonPool:
    """A few daemon threads that take tasks from one queue, until :meth:`close`.

    Where the system refuses to start any thread, tasks run in the thread that submits them.

    Args:
        threads: how many, at most.
        name: of each thread, before its number.
        on_all_cores: False for threads that stay on the cores of this process.
    """

    def __init__(self, threads: int, name: str, *, on_all_cores: bool = True) -> None:
        self._on_all_cores = on_all_cores
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        started = [start_thread(f"{name}-{index}", self._work) for index in range(threads)]
        self._threads = [thread for thread in started if thread]

    @property
    def size(self) -> int:
        """Number of threads."""
        return len(self._threads)

    def submit(self, task: Task) -> None:
        """Run a task that raises nothing, soon."""
        if self._threads:
            self._tasks.put(task)
        else:
            task()

    def future(self, task: Callable[[], Result]) -> Future[Result]:
        """Run a task soon; the future has its result, or what it has raised."""
        future: Future[Result] = Future()
        self.submit(partial(_resolve, future, task))
        return future

    def run_all(self, tasks: Sequence[Task]) -> None:
        """Run all of the tasks; return, or raise, when none of them is running any more.

        Raises:
            BaseException: whatever the first failed task has raised.
        """
        futures = [self.future(task) for task in tasks]
        failures = [future.exception() for future in futures]
        for failure in failures:
            if failure:
                raise failure

    def close(self, until: float | None = None) -> None:
        """Let the threads end after the tasks submitted so far, and wait for that, but not for long.

        One that is not waited for may hold memory for a moment, and aborts a process that ends in that moment.

        Args:
            until: by the monotonic clock; the wait ends then, if it is not over before.
        """
        for _ in self._threads:
            self._tasks.put(None)
        deadline = min(time.monotonic() + JOIN_SECONDS, math.inf if until is None else until)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._threads = []

    def _work(self) -> None:
        if self._on_all_cores:
            _use_all_cores()
        while (task := self._tasks.get()) is not None:
            task()
            del task  # with the memory that it holds, which the next one may be long in coming for


class Countdown:
    """Calls a function when it has been called ``number`` times itself, from whatever threads."""

    def __init__(self, number: int, then: Callable[[], None]) -> None:
        self._left, self._then = number, then
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            left = self._left
        if not left:
            self._then()


def _resolve(future: Future[Result], task: Callable[[], Result]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(task())
    except BaseException as error:  # noqa: BLE001 - whoever asks for the result raises it
        future.set_exception(error)


def start_thread(name: str, work: Task) -> threading.Thread | None:
    """Start a daemon thread; None where the system refuses one."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def _use_all_cores() -> None:
    """Let this thread run on every core: vLLM's CPU worker is pinned to its own, often a single one."""
    with suppress(AttributeError, OSError):  # not Linux, or not allowed
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the kernel keeps to the cgroup's set
