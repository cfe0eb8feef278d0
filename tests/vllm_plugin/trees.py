"""What the tests ask of a tree of processes after its end."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

from tests.server import Server

LIMIT_SECONDS = 10.0
_SHARED_MEMORY = Path("/dev/shm")


def shared_memory() -> set[Path]:
    """The segments that lie in shared memory now."""
    return set(_SHARED_MEMORY.iterdir())


def assert_nothing_new(before: set[Path], within: float = LIMIT_SECONDS) -> None:
    """No segment was left in shared memory since ``before``, or it goes soon."""
    deadline = time.monotonic() + within
    while (left := shared_memory() - before) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == set()


def assert_all_gone(family: list[psutil.Process], within: float = LIMIT_SECONDS) -> None:
    """No process of a tree is left."""
    _, left = psutil.wait_procs(family, timeout=within)
    assert [process.name() for process in left if process.status() != psutil.STATUS_ZOMBIE] == []


def last_line(server: Server) -> str:
    """The last line that a server printed."""
    return server.text().strip().splitlines()[-1]
