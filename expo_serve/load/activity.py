"""What the reads of one load are doing, for those who watch it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_LOCK = threading.Lock()
"""One for all: who holds it only adds, and a loader that counts must travel to other processes."""


@dataclass
class ReadActivity:
    """Of one load; any thread may write to it."""

    reading: dict[int, tuple[tuple[Path, ...], float]] = field(default_factory=dict)
    """By thread: the files of the read that is under way, and when it began (:func:`time.monotonic`)."""
    read_bytes: int = 0
    """What has come so far."""

    def add_bytes(self, count: int) -> None:
        """Count what a read has brought."""
        with _LOCK:
            self.read_bytes += count

    @contextmanager
    def during(self, *files: Path) -> Iterator[None]:
        """While this thread reads of these files."""
        thread = threading.get_ident()
        self.reading[thread] = files, time.monotonic()
        try:
            yield
        finally:
            del self.reading[thread]

    def slowest(self) -> tuple[tuple[Path, ...], float] | None:
        """The files of the read that has been under way longest, and for how many seconds."""
        started = min(list(self.reading.values()), key=lambda item: item[1], default=None)
        return started and (started[0], time.monotonic() - started[1])
