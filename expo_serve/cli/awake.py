"""Tells a process that was frozen, with all others, from one whose partner is silent."""

from __future__ import annotations

import time


class Awake:
    """Since when a process has looked without a long pause: while it was frozen, nobody else could write either.

    Args:
        seconds: between two looks, after which the process has been frozen (a paused container).
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since = self._looked = time.monotonic()

    def look(self) -> float:
        """Look, and return since when this goes on: CLOCK_MONOTONIC, in seconds."""
        now = time.monotonic()
        if now - self._looked > self._seconds:
            self._since = now
        self._looked = now
        return self._since
