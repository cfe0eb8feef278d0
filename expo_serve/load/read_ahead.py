"""Bringing cold files into the page cache in file order, with one thread for each operand.

Threads that combine take blocks of both files side by side. From the page cache any order is as good; from a disk it
is not, since the kernel reads ahead only for a reader that goes straight on. The page cache is the buffer, so reading
ahead costs no memory of ours, and its distance is bounded by what may be submitted and not done. Measurements:
docs/performance.md#read-ahead.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from expo_serve.load import sizes
from expo_serve.load.counts import ReadActivity
from expo_serve.load.selection import FileSpan
from expo_serve.load.threads import JOIN_SECONDS, Countdown, DaemonPool


class ReadAhead:
    """Reads cold spans, from the first one to :meth:`close`.

    Args:
        activity: records what is being read.
        on_all_cores: see :class:`~expo_serve.load.threads.DaemonPool`.
    """

    def __init__(self, activity: ReadActivity, *, on_all_cores: bool = True) -> None:
        self._activity, self._on_all_cores = activity, on_all_cores
        self._pools: dict[str, DaemonPool] = {}
        self._scratch = threading.local()
        self._ended = False
        self._cached: dict[int, tuple[int, int]] = {}
        """By descriptor: the last stretch of the file that was found in the page cache."""

    def defer(self, spans: Sequence[FileSpan], then: Callable[[], None]) -> bool:
        """Call ``then`` once these spans are in the page cache; False if they are already, and nothing is deferred.

        ``then`` is called whatever goes wrong with a read: the task that needs the bytes meets the same error, and can
        name the tensor.
        """
        cold = [part for part in spans if not self._is_cached(part)]
        arrived = Countdown(len(cold), then)
        for part in cold:
            self._pool(part.operand).submit(lambda part=part: self._bring(part, arrived))  # type: ignore[misc]
        return bool(cold)

    def close(self, until: float | None = None) -> None:
        """Let the threads end, and wait for that, as :meth:`~expo_serve.load.threads.DaemonPool.close` does."""
        self._ended = True
        until = until or time.monotonic() + JOIN_SECONDS
        for pool in self._pools.values():
            pool.close(until)

    def _is_cached(self, part: FileSpan) -> bool:
        """Ask for a span, or for some of the file behind it too: most spans are answered by what was asked before."""
        first, end = self._cached.get(part.descriptor, (0, 0))
        if first <= part.offset and part.end <= end:
            return True
        further = replace(part, length=part.length + sizes.BLOCK_BYTES)
        if further.end <= os.fstat(part.descriptor).st_size and further.is_cached():
            self._cached[part.descriptor] = part.offset, further.end
            return True
        return part.is_cached()

    def _pool(self, operand: str) -> DaemonPool:
        if operand not in self._pools:
            self._pools[operand] = DaemonPool(1, f"expo-ahead-{operand}", on_all_cores=self._on_all_cores)
        return self._pools[operand]

    def _bring(self, part: FileSpan, arrived: Callable[[], None]) -> None:
        try:
            self._read(part)
        finally:
            arrived()

    def _read(self, part: FileSpan) -> None:
        memory = self._memory()
        for offset in range(part.offset, part.end, len(memory)):
            try:
                with self._activity.during(part.path):
                    if self._ended or not os.preadv(part.descriptor, [memory[: part.end - offset]], offset):
                        return
            except OSError:
                return

    def _memory(self) -> memoryview:
        """Return this thread's buffer; its content is never looked at."""
        if not hasattr(self._scratch, "memory"):
            self._scratch.memory = memoryview(bytearray(sizes.READ_AHEAD_BYTES))
        memory: memoryview = self._scratch.memory
        return memory
