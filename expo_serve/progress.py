"""Progress of long work: a bar on a terminal, a line every ten seconds elsewhere, a warning when storage is silent.

Loading, merging, packing and verifying all report through :class:`Progress`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from expo_serve import errors


class Reads(Protocol):
    """What is known about the reads of the work."""

    read_bytes: int
    """Bytes read so far."""

    def slowest(self) -> tuple[tuple[Path, ...], float] | None:
        """Return the files of the read that has been in progress longest, and its age in seconds."""


class Progress:
    """Reports one piece of work while its context is active.

    Args:
        label: names the work, for example ``expo-serve: merge``.
        total: size of the work in bytes, in the unit that :meth:`advance` counts.
        on_terminal: True draws a bar on standard error, False writes lines.
        is_shown: False shows neither bar nor lines, but still warns. Only one rank of a load shows its progress.
        say: writes one line; by default on standard error.
        warn: writes one warning, without the label; by default on standard error.
        on_tick: called every half second, and at the end.
    """

    tick_seconds = 0.5
    """How often the bar is drawn and the reads are checked."""
    line_seconds = 10.0
    """Time between two lines."""
    silent_seconds = 30.0
    """Age of a read that causes a warning, and time between two warnings."""

    def __init__(
        self,
        label: str,
        total: int,
        *,
        on_terminal: bool,
        is_shown: bool = True,
        say: Callable[[str], None] | None = None,
        warn: Callable[[str], None] = errors.warn,
        on_tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._label = label
        self._total = total
        self._is_shown = is_shown
        self._say = say or _print
        self._warn = warn
        self._on_tick = on_tick
        self._reads: Reads | None = None
        self._done = 0
        self._started = time.monotonic()
        self._next_line = self._started + self.line_seconds
        self._next_warning = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="expo-progress", daemon=True)
        self._bar: Any = _bar(label, total) if on_terminal and is_shown and total else None

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._on_tick()
        if self._bar is not None:
            if kind is None:
                self._done = self._total
            self._draw()
            self._bar.close()

    def advance(self, size: int) -> None:
        """Count ``size`` more bytes as done. Only one thread calls this."""
        self._done += size

    def watch(self, reads: Reads) -> None:
        """Show the bytes and the rate of these reads, and warn when one of them takes too long."""
        self._reads = reads

    def _run(self) -> None:
        while not self._ended.wait(self.tick_seconds):
            now = time.monotonic()
            self._on_tick()
            if self._bar is not None:
                self._draw()
            elif self._is_shown and now >= self._next_line:
                self._next_line = now + self.line_seconds
                self._say(self.line(now - self._started))
            self._check_reads(now)

    def _draw(self) -> None:
        self._bar.update(self._done - self._bar.n)

    def line(self, seconds: float) -> str:
        """Return the progress after this many seconds as one line.

        The rate is that of the bytes read where reads are watched: a rank of several reads fewer bytes than ``total``.
        """
        size, verb = (self._reads.read_bytes, "read") if self._reads else (self._done, "done")
        left = f", about {seconds * (self._total / self._done - 1):.0f} s left" if self._done else ""
        return (
            f"{self._label}: {self._done / max(self._total, 1):.0%} after {seconds:.0f} s, "
            f"{size / 1e9:.1f} GB {verb} at {size / 1e6 / seconds:,.0f} MB/s{left}"
        )

    def _check_reads(self, now: float) -> None:
        slowest = self._reads.slowest() if self._reads else None
        if slowest and slowest[1] >= self.silent_seconds and now >= self._next_warning:
            self._next_warning = now + self.silent_seconds
            files = " or ".join(map(str, slowest[0]))
            self._warn(f"no data from {files} for {slowest[1]:.0f} s; still waiting for the storage")


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _bar(label: str, total: int) -> Any:
    from tqdm import tqdm  # on a terminal only: a refusal is answered without its import

    return tqdm(total=total, desc=label, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True)
