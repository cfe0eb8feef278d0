"""Which way of reading and storing is fastest here: measured during the load, a block at a time.

Mapping a file costs nothing where the page cache holds it in large folios and more than copying where it holds it in
single pages; non-temporal stores help one processor and hinder another. No interface tells; two machines of one kind
differed by a factor of 1.8 (docs/performance.md#ways). So the first large blocks of a load go each way in turn, and
most of the others go the one that took least. Every way gives the same bits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

LEAST_BYTES = 1 << 20
"""Blocks below this are not measured: what a call costs is more than what the way changes."""
_TRIALS = 2
"""Blocks that go each way first."""
_AGAIN_AFTER = 24
"""Blocks, of which one goes another way than the best: files differ, and so may what comes later."""
_MEMORY = 0.5
"""The weight of the last measurement against all before it."""


class Way(NamedTuple):
    """How a block is read, and how its results are stored."""

    is_mapped: bool
    is_non_temporal: bool


READ_PLAINLY = Way(is_mapped=False, is_non_temporal=False)
_ALL = tuple(Way(is_mapped, is_non_temporal) for is_mapped in (False, True) for is_non_temporal in (False, True))


class Ways:
    """Chooses a way for each block of one load; threads may share it."""

    def __init__(self) -> None:
        self._cost: dict[Way, float] = {}
        """Seconds of the processor a byte."""
        self._untried = [way for _ in range(_TRIALS) for way in _ALL]
        self._turns = 0
        self._lock = threading.Lock()

    def choose(self, size: int) -> Way:
        """Return the way for a block of so many bytes of result."""
        with self._lock:
            if size < LEAST_BYTES:
                return self._best()
            if self._untried:
                return self._untried.pop(0)
            self._turns += 1
            if self._turns % _AGAIN_AFTER:
                return self._best()
            return _ALL[self._turns // _AGAIN_AFTER % len(_ALL)]

    def _best(self) -> Way:
        return min(self._cost, key=lambda way: self._cost[way]) if self._cost else READ_PLAINLY

    @contextmanager
    def measured(self, way: Way, size: int) -> Iterator[None]:
        """Measure what this thread does, with a block of so many bytes of result.

        The time is the processor's: waiting for the GIL, for other threads and for a disk is the same whichever way.
        """
        started = time.thread_time()
        yield
        if size < LEAST_BYTES:
            return
        cost = (time.thread_time() - started) / size
        with self._lock:
            former = self._cost.get(way, cost)
            self._cost[way] = former + _MEMORY * (cost - former)
