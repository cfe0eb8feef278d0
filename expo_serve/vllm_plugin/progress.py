"""How far a load is: a bar on a terminal, a line now and then elsewhere, and a word when storage is silent."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from tqdm import tqdm

from expo_serve.load.counts import ReadActivity
from expo_serve.vllm_plugin import compat

logger = compat.init_logger("vllm.expo_serve.progress")


class LoadProgress:
    """Shows one load between entering and leaving the context.

    Args:
        total: bytes of both sides that one rank alone would read.
        activity: what the reads are doing.
        on_terminal: whether a bar can be drawn on standard error.
        is_shown: only one rank shows how far it is; each warns when its storage is silent.
    """

    tick_seconds = 0.5
    line_seconds = 10.0
    silent_seconds = 30.0

    def __init__(self, total: int, activity: ReadActivity, *, on_terminal: bool, is_shown: bool) -> None:
        self._total = total
        self._activity = activity
        self._is_shown = is_shown
        self._passed = 0
        self._started = time.monotonic()
        self._next_line = self._started + self.line_seconds
        self._next_warning = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="expo-progress", daemon=True)
        self._bar: Any = None
        if on_terminal and is_shown and total:
            self._bar = tqdm(
                total=total,
                desc="expo: loading weights",
                unit="B",
                unit_scale=True,
                file=sys.stderr,
                dynamic_ncols=True,
            )

    def __enter__(self) -> LoadProgress:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._bar is not None:
            if kind is None:
                self._passed = self._total
            self._draw()
            self._bar.close()

    def advance(self, count: int) -> None:
        """A tensor is done with, of which one rank alone would read so many bytes."""
        self._passed += count

    def _watch(self) -> None:
        while not self._ended.wait(self.tick_seconds):
            now = time.monotonic()
            if self._bar is not None:
                self._draw()
            elif self._is_shown and now >= self._next_line:
                self._next_line = now + self.line_seconds
                logger.info("%s", self._line(now))
            self._warn_of_silence(now)

    def _draw(self) -> None:
        self._bar.update(self._passed - self._bar.n)

    def _line(self, now: float) -> str:
        seconds = now - self._started
        read = self._activity.read_bytes
        left = f", about {seconds * (self._total / self._passed - 1):.0f} s left" if self._passed else ""
        return (
            f"expo: loading weights: {self._passed / max(self._total, 1):.0%} after {seconds:.0f} s, "
            f"{read / 1e9:.1f} GB read at {read / 1e6 / seconds:,.0f} MB/s{left}"
        )

    def _warn_of_silence(self, now: float) -> None:
        slowest = self._activity.slowest()
        if slowest and slowest[1] >= self.silent_seconds and now >= self._next_warning:
            self._next_warning = now + self.silent_seconds
            files = " or ".join(map(str, slowest[0]))
            logger.warning(
                "expo: nothing has come from %s for %.0f s; still waiting for its storage", files, slowest[1]
            )
