"""The page cache of given files: put them in, drop them, and say how much of them is there."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

_PIECE = 8 << 20
_PROBE = 256 << 10


def read_all(files: Iterable[Path]) -> float:
    """Read files from end to end, as plainly as it goes; returns the seconds."""
    buffer = bytearray(_PIECE)
    started = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as raw:
            while raw.readinto(buffer):
                pass
    return time.perf_counter() - started


def drop(files: Iterable[Path]) -> None:
    """Take just these files out of the page cache. What is not on disk yet cannot be dropped: sync first."""
    for file in files:
        with file.open("rb") as raw:
            os.fsync(raw.fileno())
            os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_share(files: Iterable[Path]) -> float:
    """The share of probes (one byte in 256 KiB) that a read finds in the page cache."""
    found = probes = 0
    byte = bytearray(1)
    for file in files:
        with file.open("rb", buffering=0) as raw:
            for offset in range(0, file.stat().st_size, _PROBE):
                probes += 1
                try:
                    found += os.preadv(raw.fileno(), [byte], offset, os.RWF_NOWAIT)
                except BlockingIOError:  # it would have to wait for the disk
                    continue
    return found / max(probes, 1)


def warm(files: list[Path]) -> float:
    """Bring the files into the page cache where they are not; returns the share that is there then."""
    if resident_share(files) < 1:
        read_all(files)
    return resident_share(files)
