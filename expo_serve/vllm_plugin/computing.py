"""Tells a CPU that computes a long step of the model from one that hangs.

Nothing answers before a step is over, and on a slow CPU that can take minutes. But a rank that computes wants a core
all the time, while one that is stopped, or waits for a lock, a file or another process, wants none. On an accelerator
that says nothing: there a thread may spin while it waits for a device that hangs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from expo_serve.state.shared import SharedState

_BUSY_SHARE = 0.5
"""Of the time: a rank that computes with several threads waits for the slowest of them now and then."""


class Computing:
    """Sees whether ranks compute.

    Args:
        state: the command's shared memory, in which ranks say when they have last answered.
    """

    def __init__(self, state: SharedState) -> None:
        self._state = state
        self._looked = time.monotonic()
        self._wanted: dict[int, float] = {}
        """How long each process's main thread has wanted a core, in seconds, when it was last looked at."""

    def look(self, since: float) -> bool:
        """Return whether all ranks that owe an answer have computed for most of the time since the last look.

        Args:
            since: CLOCK_MONOTONIC at which they were asked.
        """
        before, looked, now = self._wanted, self._looked, time.monotonic()
        self._wanted, self._looked = dict(self._read(since)), now
        grown = [wanted - before.get(pid, wanted) for pid, wanted in self._wanted.items()]
        return bool(grown) and min(grown) > _BUSY_SHARE * (now - looked)

    def _read(self, since: float) -> Iterator[tuple[int, float]]:
        for rank in self._state.reports("rank"):
            if rank.get("alive", 0.0) < since and (wanted := _wanted_core(rank["pid"])) is not None:
                yield rank["pid"], wanted


def _wanted_core(pid: int) -> float | None:
    """Return for how many seconds a process's main thread was on a core, or waited for one; None where nobody counts.

    The kernel's documentation of sched-stats describes the file.
    """
    try:
        on_core, waited, _ = Path(f"/proc/{pid}/schedstat").read_text().split()
    except (OSError, ValueError):
        return None
    return (int(on_core) + int(waited)) / 1e9
