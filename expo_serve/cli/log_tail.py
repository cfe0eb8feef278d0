"""Copies a child's output, and keeps the lines in which the root cause of a failure is looked for.

The child is always read, so that it never waits in the middle of a request for somebody to read its log.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from expo_serve.cli.live_line import LiveLine
from expo_serve.cli.outlet import Outlet
from expo_serve.cli.printable import printable
from expo_serve.cli.vllm_log import is_exception, is_fatal, without_prefix
from expo_serve.errors import ERROR_PREFIX

_CHUNK_BYTES = 1 << 16
_LINE_BYTES = 8 << 10
"""Of the beginning of a line: what is kept and looked at."""
_FEW_LINES = 8
"""In a chunk of the log: their beginnings are looked at without looking through the chunk."""
_KEPT_BYTES = 1 << 20
_KEPT_LINES = 2000
_RECENT_LINES = 20_000
"""Of all lines: what is further back says nothing about a failure any more."""
_STALLED_SECONDS = 2.0
_FINISH_SECONDS = 10.0
"""Time for a slow reader to read what is held at the end."""
_STDERR = 2
_OURS = "expo_serve.errors."


class LogTail:
    """The lines of a child's output streams that tell of a failure; each stream is copied by a thread.

    Args:
        live: returns what stands below the log on a terminal; None ends it.
    """

    def __init__(self, live: Callable[[], str | None] | None = None) -> None:
        self._lines: deque[tuple[int, bytes]] = deque()  # with their numbers
        self._bytes = 0
        self._count = 0
        self._failed_at = math.inf  # number of the first line that reports a failure
        self._counting = threading.Lock()
        self._readers: list[threading.Thread] = []
        self._outlets: list[Outlet] = []
        self._turns: dict[tuple[int, int], threading.Lock] = {}
        self._live = LiveLine(_STDERR, self._turn(_STDERR) or threading.Lock(), live) if live else None
        self.failed = threading.Event()
        """Set when a line reports that an engine or worker has failed."""
        self.failed_time = math.inf
        """CLOCK_MONOTONIC when the first such line came."""

    def follow(self, source: int, target: int) -> None:
        """Copy from one file descriptor to another until the end of the source, whether somebody reads it or not."""
        live = self._live
        outlet = Outlet(target, self._turn(target), before=live.clear if live and os.isatty(target) else lambda: None)
        reader = threading.Thread(target=self._copy, args=(source, outlet), daemon=True)
        reader.start()
        self._readers.append(reader)
        self._outlets.append(outlet)

    def show_live(self) -> None:
        """Begin to draw the line below the log, where there is one; all streams are followed."""
        if self._live:
            self._live.start(self._outlets)

    def finish_reading(self, timeout: float = 2.0) -> None:
        """Wait until the ends of all streams have been seen, at most ``timeout`` seconds."""
        give_up = time.monotonic() + timeout
        for reader in self._readers:
            reader.join(max(0.0, give_up - time.monotonic()))

    def finish(self, timeout: float = 2.0) -> None:
        """Wait until all is copied; bounded, as a stream may never end, and a reader may be slow or stall.

        Args:
            timeout: the most seconds to wait for the ends of the streams; readers get up to ten more.
        """
        if self._live:
            self._live.end()
        self.finish_reading(timeout)
        give_up = time.monotonic() + _FINISH_SECONDS
        for outlet in self._outlets:
            outlet.finish(_STALLED_SECONDS, give_up - time.monotonic())

    def _turn(self, target: int) -> threading.Lock | None:
        """Return the lock of the file behind a descriptor."""
        try:
            status = os.fstat(target)
        except OSError:
            return None  # closed: all writes will fail
        return self._turns.setdefault((status.st_dev, status.st_ino), threading.Lock())

    def _copy(self, source: int, outlet: Outlet) -> None:
        rest = b""
        while chunk := os.read(source, _CHUNK_BYTES):
            outlet.put(chunk)
            try:
                rest = self._look_at(rest + chunk)
            except Exception:  # noqa: BLE001 - whatever it is, vLLM must not wait for somebody who reads
                rest = b""
        if rest:
            self._look_at(rest + b"\n")

    def _look_at(self, block: bytes) -> bytes:
        """Look at all lines that end in a block; returns the beginning of the one that does not."""
        end = block.rfind(b"\n") + 1
        count = block.count(b"\n")
        with self._counting:
            if count < _FEW_LINES or _may_tell(block):
                for number, line in enumerate(block[:end].split(b"\n")[:-1], self._count + 1):
                    self._remember(number, line[: _LINE_BYTES + 1])
            self._count += count
        return block[end : end + _LINE_BYTES + 1]  # one byte more shows that the line is longer

    def _remember(self, number: int, raw: bytes) -> None:
        if not _may_tell(raw):
            return
        if (b"failed" in raw or b"fatal" in raw) and is_fatal(_text(raw)):
            self._failed_at = min(self._failed_at, number)
            self.failed_time = min(self.failed_time, time.monotonic())
            self.failed.set()
        self._lines.append((number, raw))
        self._bytes += len(raw)
        while self._bytes > _KEPT_BYTES or len(self._lines) > _KEPT_LINES:
            self._forget_one()

    def _forget_one(self) -> None:
        """Forget the oldest line, or the newest after a failure: many clients that go on failing hide no cause."""
        is_cause = self._lines[0][0] >= self._failed_at
        _, raw = self._lines.pop() if is_cause else self._lines.popleft()
        self._bytes -= len(raw)

    def _kept(self, newest: int = _RECENT_LINES) -> list[str]:
        """Return the kept ones among the newest lines."""
        with self._counting:
            return [_text(raw) for number, raw in self._lines if number > self._count - newest]

    def ends_with_error(self) -> bool:
        """Return whether the last line is an error line of expo-serve, so that no other is needed."""
        return any(line.startswith(ERROR_PREFIX) for line in self._kept(newest=1))

    def root_cause(self) -> str | None:
        """Return the exception that started the failure, in one line without control characters.

        It is the first exception after a line that reports a failed engine or worker. What processes of expo-serve know
        better, they report elsewhere (:mod:`expo_serve.state.shared`).
        """
        lines = self._kept()
        start = next((index for index, line in enumerate(lines) if is_fatal(line)), len(lines))
        return next(_exceptions(lines[start:]), None)

    def last_exception(self) -> str | None:
        """Return the exception that was printed last, as above; it need not have ended the child."""
        return next(_exceptions(reversed(self._kept())), None)


def _text(raw: bytes) -> str:
    """Return a line of the log without its prefix, and cut if it is long."""
    line = without_prefix(raw[:_LINE_BYTES].decode(errors="replace"))
    return f"{line} ..." if len(raw) > _LINE_BYTES else line


def _may_tell(text: bytes) -> bool:
    """Return whether a line that tells of a failure can be in a text: such a line has one of these words.

    Looking for them is several times faster than looking at each line, also than a regular expression would be.
    """
    return (
        b"rror" in text
        or b"xception" in text
        or b"failed" in text
        or b"Dead" in text
        or b"Exit" in text
        or b"Interrupt" in text
    )


def _exceptions(lines: Iterable[str]) -> Iterator[str]:
    return (printable(_without_our_class(line)) for line in lines if is_exception(line))


def _without_our_class(line: str) -> str:
    return line.partition(": ")[2] if line.startswith(_OURS) else line
