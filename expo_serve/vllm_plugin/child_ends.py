"""Tells the command how children of vLLM's processes ended: only their parents learn it, and vLLM says it nowhere."""

from __future__ import annotations

import os
import time
from functools import cache
from multiprocessing import util

from expo_serve.state.shared import Reporter, SharedState
from expo_serve.vllm_plugin.children import ChildEnd, watch_children


def report_child_ends() -> None:
    """Report each child of this process that ends, below the command; can be called repeatedly.

    A process that multiprocessing forks from this one does the same: vLLM loads no plugin again there.
    """
    _report_in_process(os.getpid())
    _report_in_forks()


@cache
def _report_in_process(pid: int) -> None:  # a fork inherits what is cached, but not the thread
    if (state := SharedState.find()) is not None:
        watch_children(_Ends(state).add)


@cache
def _report_in_forks() -> None:  # these inherit what is registered too
    util.register_after_fork(report_child_ends, lambda _: report_child_ends())


class _Ends:
    """The children that have ended, as the field ``ended`` of a report: id, name, exit code, CLOCK_MONOTONIC."""

    def __init__(self, state: SharedState) -> None:
        self._state = state
        self._reporter: Reporter | None = None
        self._ended: list[tuple[int, str, int, float]] = []

    def add(self, end: ChildEnd) -> None:
        """Report one more."""
        if end.exitcode is not None:
            self._ended.append((end.pid, end.name, end.exitcode, time.monotonic()))
            self._report()

    def _report(self) -> None:
        if self._reporter is None:  # only now, as most processes have no children
            self._reporter = self._state.reporter("parent", ended=self._ended)
        else:
            self._reporter.update(ended=self._ended)
