"""Cold files are brought into the page cache in their order, one thread a side, before anybody combines them.

Threads that combine take blocks of both files side by side. From the page cache that is as good as any order; from a
disk it is not: the kernel reads ahead for whoever goes straight on. A pair of 2.3 GB a side took 2.0 times as long as
one side with a thread for each file, and 2.4 where two threads took turns at blocks of 8 MB (medians of six, in turn;
the disk's rate was 2.5 GB/s, and 2.0 is what the bytes allow). The page cache is the buffer, so this costs no
memory of ours; how far it is ahead is bounded by what may be handed over and not done.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from expo_serve.load.activity import ReadActivity
from expo_serve.load.threads import leave_core, start

CHUNK_BYTES = 1 << 20
"""Asked for at a time: more than the kernel's own window for reading ahead goes around it."""


@dataclass(frozen=True, slots=True)
class FileSpan:
    """Bytes of an open file, of one side."""

    side: str
    path: Path
    descriptor: int
    offset: int
    length: int

    def is_cached(self) -> bool:
        """Whether its last byte is in the page cache, and so most likely all that lies before it.

        True also where the system cannot say it.
        """
        try:
            os.preadv(self.descriptor, [bytearray(1)], self.offset + self.length - 1, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except (OSError, AttributeError):  # the file system, or the platform, does not know the flag
            return True
        return True


class _Countdown:
    """Calls something once as many have said so as were counted."""

    def __init__(self, number: int, then: Callable[[], None]) -> None:
        self._left = number
        self._then = then
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            left = self._left
        if not left:
            self._then()


class ReadAhead:
    """A thread for each side, from its first cold range to :meth:`close`.

    Args:
        activity: where the threads say what they are doing.
    """

    def __init__(self, activity: ReadActivity) -> None:
        self._activity = activity
        self._queues: dict[str, SimpleQueue[tuple[FileSpan, Callable[[], None]] | None]] = {}
        self._ended = False

    def bring(self, ranges: Sequence[FileSpan], then: Callable[[], None]) -> None:
        """Call ``then`` once these bytes are in the page cache: at once, where they are.

        Whatever goes wrong with a read, ``then`` is called: who needs the bytes finds out too, and can say for what.
        """
        cold = [part for part in ranges if not part.is_cached()]
        if not cold:
            then()
            return
        done = _Countdown(len(cold), then)
        for part in cold:
            queue = self._queue(part.side)
            if queue is None:
                done()
            else:
                queue.put((part, done))

    def close(self) -> None:
        """Let the threads end."""
        self._ended = True
        for queue in self._queues.values():
            queue.put(None)
        self._queues = {}

    def _queue(self, side: str) -> SimpleQueue[tuple[FileSpan, Callable[[], None]] | None] | None:
        """What a side's thread takes from; None where the system refuses a thread."""
        if side not in self._queues:
            queue: SimpleQueue[tuple[FileSpan, Callable[[], None]] | None] = SimpleQueue()
            memory = bytearray(CHUNK_BYTES)
            if not start(f"expo-ahead-{side}", lambda: self._work(queue, memory)):
                return None
            self._queues[side] = queue
        return self._queues[side]

    def _work(self, queue: SimpleQueue[tuple[FileSpan, Callable[[], None]] | None], memory: bytearray) -> None:
        leave_core()
        while (item := queue.get()) is not None:
            part, done = item
            try:
                self._read(part, memory)
            finally:
                done()

    def _read(self, part: FileSpan, memory: bytearray) -> None:
        for offset in range(part.offset, part.offset + part.length, CHUNK_BYTES):
            size = min(CHUNK_BYTES, part.offset + part.length - offset)
            try:
                with self._activity.during(part.path):
                    if self._ended or not os.preadv(part.descriptor, [memoryview(memory)[:size]], offset):
                        return
            except OSError:
                return
