"""Progress of a sweep: a bar on a terminal, a line every ten seconds elsewhere; with the time that is left."""

from __future__ import annotations

import sys
import time
from typing import Any

_LINE_SECONDS = 10.0


class Meter:
    """Shows what is being done, how far it is, and about how long the sweep will take.

    Args:
        alphas: how many alphas there will be; None while that is open.
        on_terminal: whether standard error is a terminal.
    """

    def __init__(self, alphas: int | None, *, on_terminal: bool) -> None:
        self._alphas = alphas
        self._done_alphas = 0
        self._what, self._done, self._total, self._is_most = "", 0, 0, False
        self._started = self._begun = self._next_line = time.monotonic()
        self._bar = _bar() if on_terminal else None
        self._task: Any = None

    def __enter__(self) -> Meter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, what: str, total: int, *, is_most: bool = False) -> None:
        """Begin a piece of work.

        Args:
            what: names it.
            total: its steps; 0 where they cannot be counted.
            is_most: whether it is most of the work at an alpha, so that its share is about that of the alpha.
        """
        self._is_most = is_most
        self._what, self._done, self._total, self._begun = what, 0, total, time.monotonic()
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what, total=total or None, left=self._left())
        else:
            self._say()

    def advance(self) -> None:
        """Count one step as done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, left=self._left())
        elif time.monotonic() >= self._next_line:
            self._say()

    def alpha_done(self) -> None:
        """Count one alpha as done."""
        self._done_alphas += 1

    def line(self) -> str:
        """Return the progress as one line."""
        count = f" {self._done} of {self._total}" if self._total else ""
        left = self._left()
        return f"expo-serve: sweep: {self._what}{count}{', ' + left if left else ''}"

    def _say(self) -> None:
        self._next_line = time.monotonic() + _LINE_SECONDS
        print(self.line(), file=sys.stderr, flush=True)

    def _left(self) -> str:
        """Return about how long the rest will take, from what is done."""
        now, share = time.monotonic(), self._done / max(1, self._total)
        part = share if self._is_most else 1.0
        if self._alphas and 0 < self._done_alphas < self._alphas:
            done = min(self._done_alphas + part, self._alphas)
            seconds = (now - self._started) / done * (self._alphas - done)
        elif self._alphas and self._done_alphas and share:  # all alphas are observed: this is the last piece
            seconds = (now - self._begun) / share * (1 - share)
        else:
            return ""
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {max(1.0, seconds):.0f} s left"


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[left]}"), console=Console(stderr=True), transient=True)
