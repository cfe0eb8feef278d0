"""Pipes whose reader stalls, and what comes out of them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PIPE_BYTES = 1 << 16
NOTICE = re.compile(rb"expo-serve: warning: (\d+) log lines? \([\d,.]+ [kM]B\) w(?:as|ere) dropped(.*)\n")
STALLED = b" while nobody read the output"
_SECONDS = 20.0


@contextmanager
def new_pipe() -> Iterator[tuple[int, int]]:
    """The ends of a pipe, to read and to write. In the end the former is closed first: then no writer waits."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            close(end)


def close(descriptor: int) -> None:
    """Close a descriptor, which may be closed already."""
    with suppress(OSError):
        os.close(descriptor)


def fill(writer: int) -> bytes:
    """Write until a pipe holds no more; returns what it holds."""
    os.set_blocking(writer, False)
    held = b""
    with suppress(BlockingIOError):
        while True:
            held += b"." * os.write(writer, b"." * 4096)
    os.set_blocking(writer, True)
    return held


def read_until(descriptor: int, ending: bytes) -> bytes:
    """Read until what came ends so."""
    found, deadline = b"", time.monotonic() + _SECONDS
    while not found.endswith(ending):
        assert time.monotonic() < deadline, found[-300:]
        found += os.read(descriptor, PIPE_BYTES)
    return found


def lines(count: int, first: int = 0) -> bytes:
    """Numbered lines of 100 bytes."""
    return b"".join(b"%-99d\n" % number for number in range(first, first + count))


def dropped(output: bytes) -> int:
    """How many lines the notices in an output count."""
    return sum(int(match[1]) for match in NOTICE.finditer(output))
