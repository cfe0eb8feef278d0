"""The state of a start as the last line of a terminal, below the log."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

_CLEAR = b"\r\x1b[K"  # ECMA-48: erase to the end of the line
_TICK_SECONDS = 0.5
_COLUMNS = 80


class AtLineEnd(Protocol):
    """An output that shares the terminal."""

    @property
    def is_at_line_end(self) -> bool:
        """Whether it has written whole lines so far."""


class LiveLine:
    """A line that is drawn again and again, and taken away before anything else is written.

    Args:
        target: descriptor of the terminal.
        turn: held by whoever writes to it.
        text: returns the line; None ends it.
    """

    def __init__(self, target: int, turn: Any, text: Callable[[], str | None]) -> None:
        self._target, self._turn, self._text = target, turn, text
        self._is_drawn = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, others: Sequence[AtLineEnd]) -> None:
        """Begin to draw.

        Args:
            others: outputs that share the terminal; they call :meth:`clear` before they write.
        """
        self._others = others
        self._thread.start()

    def end(self) -> None:
        """Take the line away for good; bounded, as a terminal can be held (Ctrl-S)."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(_TICK_SECONDS)

    def clear(self) -> None:
        """Take the line away; the caller has the turn."""
        if self._is_drawn:
            self._is_drawn = False
            self._write(_CLEAR)

    def _run(self) -> None:
        while not self._ended.wait(_TICK_SECONDS) and (text := self._text()) is not None:
            with self._turn:
                if all(other.is_at_line_end for other in self._others):
                    self._is_drawn = True
                    self._write(_CLEAR + text[: self._columns() - 1].encode())
        with self._turn:
            self.clear()

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._target).columns or _COLUMNS
        except OSError:
            return _COLUMNS

    def _write(self, data: bytes) -> None:
        with suppress(OSError):
            os.write(self._target, data)


def can_show(target: int) -> bool:
    """Return whether a descriptor is a terminal that can erase a line."""
    return os.isatty(target) and os.environ.get("TERM", "dumb") != "dumb"
