"""Writes output for a reader that may stall: what finds no room is dropped and counted, and whoever puts never waits.

A thread writes, in blocking mode. The flag ``O_NONBLOCK`` would belong to the open file and so change it for every
program that shares it, such as the user's shell; and only pipes and terminals can be opened a second time.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from expo_serve.errors import count_of, warning_line

LIMIT_BYTES = 4 << 20
"""Held for a reader that stalls: tens of thousands of lines of vLLM's log."""
_BLOCK_BYTES = 1 << 16
_PIECE_BYTES = 1 << 14
"""Of one write: each one that is done shows that somebody reads, however slowly."""
_STALLED = " while nobody read the output"


class Outlet:
    """A file descriptor that is written to by a thread of its own.

    Args:
        target: the file descriptor; nothing about it is changed.
        turn: held during a write. Outlets into one file share it, so that they do not tear each other's lines.
        limit: the most bytes that are held.
        before: called within the turn, before anything is written.
    """

    def __init__(
        self,
        target: int,
        turn: AbstractContextManager[Any] | None = None,
        limit: int = LIMIT_BYTES,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self._target = target
        self._turn = turn or threading.Lock()
        self._limit = limit
        self._before = before
        self._items: deque[bytearray | _Gap] = deque()
        self._size = 0  # bytes in the items, and in the one that is being written
        self._is_idle = True  # all is written, or nothing can be until more is put
        self._is_losing = False
        self._came_to_line_end = True
        self._wrote_to_line_end = True
        self._changed = threading.Condition()
        threading.Thread(target=self._write_for_ever, daemon=True).start()

    def put(self, data: bytes) -> None:
        """Take the next part of the output, of which whole lines are dropped where they find no room; never waits."""
        with self._changed:
            begin = self._bytes_to_skip(data)
            end = len(data)
            if self._size + end - begin > self._limit:
                end = max(begin, data.rfind(b"\n", begin, begin + self._limit - self._size) + 1)
            self._lose(data[:begin])
            self._keep(data[begin:end])
            self._lose(data[end:])
            self._is_losing = end < len(data) or begin == end
            self._came_to_line_end = data.endswith(b"\n")
            self._is_idle = False
            self._changed.notify_all()

    @property
    def is_at_line_end(self) -> bool:
        """Whether whole lines have been written so far."""
        return self._wrote_to_line_end

    def finish(self, stalled: float, limit: float) -> bool:
        """Wait until everything is written, and return whether it is.

        Args:
            stalled: seconds without a byte written after which the rest is given up.
            limit: seconds after which it is given up although bytes are written.
        """
        give_up = time.monotonic() + limit
        with self._changed:
            while not self._is_idle:
                if not self._has_moved(max(0.0, min(stalled, give_up - time.monotonic()))):
                    return False
            return not self._items

    def _has_moved(self, seconds: float) -> bool:
        """Wait until all is written or the time is over, and return whether something was."""
        size = self._size
        return self._changed.wait_for(lambda: self._is_idle or self._size < size, seconds)

    def _bytes_to_skip(self, data: bytes) -> int:
        """Return where to go on after a loss: at the next line, once half of the room is free."""
        if not self._is_losing:
            return 0
        if self._size > self._limit // 2:  # a notice for every few lines would help nobody
            return len(data)
        return 0 if self._came_to_line_end else data.find(b"\n") + 1

    def _keep(self, data: bytes) -> None:
        if not data:
            return
        last = self._items[-1] if self._items else None
        if isinstance(last, bytearray) and len(last) < _BLOCK_BYTES:
            last += data  # many small objects would take more memory than their bytes
        else:
            self._items.append(bytearray(data))
        self._size += len(data)

    def _lose(self, data: bytes) -> None:
        if not data:
            return
        last = self._items[-1] if self._items else None
        if not isinstance(last, _Gap):
            last = _Gap(_STALLED)
            self._items.append(last)
        last.add(data)

    def _write_for_ever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._is_idle)
            with self._turn:
                self._before()
                while self._write_next() and not self._wrote_to_line_end:
                    pass  # another's turn is not within a line, unless nothing more of it is there

    def _write_next(self) -> bool:
        """Write one item, and return whether there is another."""
        with self._changed:
            item = self._items.popleft()
        try:
            self._write(item)
        except OSError as error:
            self._give_up(item, error.strerror or type(error).__name__)
        with self._changed:
            self._is_idle = self._is_idle or not self._items
            self._changed.notify_all()
            return not self._is_idle

    def _write(self, item: bytearray | _Gap) -> None:
        """Write an item; what is written of it is taken off."""
        if isinstance(item, _Gap):
            notice = item.notice().encode()
            self._write_all(bytearray(notice if self._wrote_to_line_end else b"\n" + notice))
        else:
            self._write_all(item, counts=True)

    def _write_all(self, data: bytearray, *, counts: bool = False) -> None:
        while data:
            written = self._write_some(data[:_PIECE_BYTES])
            self._wrote_to_line_end = data[written - 1 : written] == b"\n"
            del data[:written]
            if counts:
                with self._changed:
                    self._size -= written

    def _write_some(self, data: bytearray) -> int:
        while True:
            try:
                return os.write(self._target, data)
            except BlockingIOError:  # somebody else has set O_NONBLOCK
                waiting = select.poll()
                waiting.register(self._target, select.POLLOUT)
                waiting.poll()

    def _give_up(self, item: bytearray | _Gap, reason: str) -> None:
        """Count all as lost, and wait for more: nobody will ever read it, or the disk is full."""
        with self._changed:
            gap = _Gap(f": {reason}")
            for lost in (item, *self._items):
                gap.add(lost)
            self._items = deque([gap])
            self._size = 0
            self._is_idle = True


class _Gap:
    """Output that was dropped between what comes before and after it; ``why`` ends the notice."""

    def __init__(self, why: str) -> None:
        self._why = why
        self._lines = 0
        self._bytes = 0

    def add(self, lost: bytes | bytearray | _Gap) -> None:
        """Count more as lost."""
        if isinstance(lost, _Gap):
            self._lines += lost._lines
            self._bytes += lost._bytes
        else:
            self._lines += lost.count(b"\n")
            self._bytes += len(lost)

    def notice(self) -> str:
        """Return the line that says how much it was."""
        lines = max(1, self._lines)
        size = f"{self._bytes / 1e6:,.1f} MB" if self._bytes >= 1e6 else f"{self._bytes / 1e3:.1f} kB"
        were = "was" if lines == 1 else "were"
        said = f"{count_of(lines, 'log line')} ({size}) {were} dropped{self._why}"
        return f"{warning_line(said)}\n"
