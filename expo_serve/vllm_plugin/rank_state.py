"""What vLLM's processes tell the command over the memory that they share: a load's progress and end, their errors."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

from expo_serve.errors import line_of, reason_of
from expo_serve.state.shared import Reporter, report_as
from expo_serve.vllm_plugin import compat


@cache
def rank_reporter() -> Reporter:
    """Return this process's reporter, which does nothing under plain vLLM."""
    parallel = compat.get_current_vllm_config().parallel_config
    now = time.monotonic()
    return report_as("rank", engine=parallel.data_parallel_index, rank=parallel.rank, began=now, updated=now)


@contextmanager
def failures_reported(reporter: Reporter) -> Iterator[None]:
    """Report an exception that passes, so that nobody has to look for it in a log."""
    try:
        yield
    except Exception as error:
        reporter.fail(reason_of(error), line_of(error))
        raise


class LoadState:
    """The progress of one load.

    Args:
        totals: bytes of each source that a single rank would read.
    """

    def __init__(self, totals: Mapping[str, int]) -> None:
        self._totals = dict(totals)
        self._done = dict.fromkeys(totals, 0)
        self._seen = -1

    def advance(self, sizes: Mapping[str, int]) -> None:
        """Count bytes of the sources as done."""
        for source, size in sizes.items():
            self._done[source] = self._done.get(source, 0) + size

    def report(self) -> None:
        """Write how far it is, if that has changed; called every half second or so."""
        done = sum(self._done.values())
        if done != self._seen:
            self._seen = done
            sources = {side: [self._done[side], total] for side, total in self._totals.items()}
            rank_reporter().update(sources=sources, updated=time.monotonic())

    def end(self) -> None:
        """Write that the weights are there."""
        self._done = dict(self._totals)
        self.report()
        rank_reporter().update(ended=time.monotonic())
