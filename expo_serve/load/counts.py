"""What went through a load, and what its reads are doing right now."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

Kind = Literal["extrapolated", "materialized", "copied"]

_LOCK = threading.Lock()
"""One for all instances: its holders only add, and an object with a lock of its own could not be pickled."""


@dataclass
class Counts:
    """Counts of one rank's load. A tensor that a rank never touches does not count."""

    read_bytes: Counter[str] = field(default_factory=Counter)
    """Bytes asked of storage, by source."""
    kinds: dict[str, Kind] = field(default_factory=dict)
    """By tensor: combined straight into the parameter, combined first because the model asked for values, or copied."""

    def add_read(self, source: str, count: int) -> None:
        """Add bytes that were read from a source; safe from any thread."""
        with _LOCK:
            self.read_bytes[source] += count

    def note(self, name: str, kind: Kind) -> None:
        """Record how a tensor went; a tensor that was materialised once stays counted as materialised."""
        if self.kinds.get(name) != "materialized":
            self.kinds[name] = kind

    def count(self) -> dict[Kind, int]:
        """Return the number of tensors by kind."""
        counts = Counter(self.kinds.values())
        return {kind: counts[kind] for kind in get_args(Kind)}


@dataclass
class ReadActivity:
    """The reads of one load that are under way; any thread may write to it."""

    reading: dict[int, tuple[tuple[Path, ...], float]] = field(default_factory=dict)
    """By thread: the files of the read that is under way, and when it began (:func:`time.monotonic`, seconds)."""
    read_bytes: int = 0
    """Bytes that have arrived."""

    def add_bytes(self, count: int) -> None:
        """Add bytes that a read has brought."""
        with _LOCK:
            self.read_bytes += count

    @contextmanager
    def during(self, *files: Path) -> Iterator[None]:
        """Mark this thread as reading these files."""
        thread = threading.get_ident()
        self.reading[thread] = files, time.monotonic()
        try:
            yield
        finally:
            del self.reading[thread]

    def slowest(self) -> tuple[tuple[Path, ...], float] | None:
        """Return the files of the read that has been under way longest, and its age in seconds."""
        started = min(list(self.reading.values()), key=lambda item: item[1], default=None)
        return started and (started[0], time.monotonic() - started[1])
