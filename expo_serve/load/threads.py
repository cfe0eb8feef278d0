"""Threads of a load: how many, where they run, and a few that do tasks together.

All are daemons: a read that hangs in the kernel must not keep a process alive that has failed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue

MAX_THREADS = 4
"""More do not help where the page cache or a disk is read: a few cores fill the memory's bandwidth."""
NETWORK_THREADS = 8
"""Where each read is a journey, more of them have to be under way; each holds two pieces of memory."""

Task = Callable[[], object]


def default_threads(on_network: bool = False) -> int:
    """How many threads load best: one a core, but for a few on a large machine, and more where reads have far to go."""
    return NETWORK_THREADS if on_network else min(MAX_THREADS, os.cpu_count() or 1)


def all_cores() -> int:
    """The cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def leave_core() -> None:
    """vLLM's CPU worker is pinned to its cores, often one; the threads of a load may use the others meanwhile."""
    with suppress(AttributeError, OSError):  # not Linux, or not allowed
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # this thread's; the kernel keeps to the cgroup's set


def start(name: str, work: Task) -> threading.Thread | None:
    """Start a thread; None where the system refuses one."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


class Workers:
    """A few threads that do the tasks of one caller, from the first ones to :meth:`close`.

    Args:
        number: of threads, at most.
        name: of each, before its number.
    """

    def __init__(self, number: int, name: str) -> None:
        self._todo: SimpleQueue[Task | None] = SimpleQueue()
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        started = [start(f"{name}-{index}", self._work) for index in range(number)]
        self._number = sum(thread is not None for thread in started)

    def do_all(self, tasks: Sequence[Task]) -> None:
        """Do all of the tasks; returns, or raises, when none of them is at work any more.

        Raises:
            BaseException: what one of them has raised.
        """
        if not self._number:
            for task in tasks:
                task()
            return
        for task in tasks:
            self._todo.put(task)
        failures = [self._done.get() for _ in tasks]
        for failure in failures:
            if failure:
                raise failure

    def close(self) -> None:
        """Let the threads end."""
        for _ in range(self._number):
            self._todo.put(None)

    def _work(self) -> None:
        leave_core()
        while (task := self._todo.get()) is not None:
            failure: BaseException | None = None
            try:
                task()
            except BaseException as error:  # noqa: BLE001 - the caller raises it
                failure = error
            self._done.put(failure)
