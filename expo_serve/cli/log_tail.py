"""Copies a child's output, and keeps its last lines to find the root cause of a failure in them."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator

from expo_serve.cli.vllm_log import is_exception, is_fatal, without_prefix
from expo_serve.errors import ERROR_PREFIX

_KEPT_LINES = 2000
_OURS = "expo_serve.errors."


class LogTail:
    """The last lines of a child's output streams; one thread per stream copies it."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._threads: list[threading.Thread] = []
        self.failed = threading.Event()
        """Set when a line reports that an engine or worker has failed."""

    def follow(self, source: int, target: int) -> None:
        """Copy from one file descriptor to another until the end of the source."""
        thread = threading.Thread(target=self._copy, args=(source, target), daemon=True)
        thread.start()
        self._threads.append(thread)

    def finish(self, timeout: float = 2.0) -> None:
        """Wait until all output has been copied, at most ``timeout`` seconds for each stream."""
        for thread in self._threads:
            thread.join(timeout)

    def _copy(self, source: int, target: int) -> None:
        rest = b""
        while chunk := os.read(source, 1 << 16):
            _write_all(target, chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._remember(line)
        if rest:
            self._remember(rest)

    def _remember(self, raw: bytes) -> None:
        line = without_prefix(raw.decode(errors="replace"))
        self._lines.append(line)
        if is_fatal(line):
            self.failed.set()

    def ends_with_error(self) -> bool:
        """Return whether one of the last lines is an error line of expo-serve, so that no other is needed."""
        return any(line.startswith(ERROR_PREFIX) for line in list(self._lines)[-5:])

    def root_cause(self) -> str | None:
        """Return the exception that started the failure.

        An exception of expo-serve comes first and is returned without its class; otherwise it is the first exception
        after a line that reports a failed engine or worker.
        """
        lines = list(self._lines)
        if own := next((line for line in lines if line.startswith(_OURS)), None):
            return own.partition(": ")[2]
        start = next((index for index, line in enumerate(lines) if is_fatal(line)), len(lines))
        return next(_exceptions(lines[start:]), None)

    def last_exception(self) -> str | None:
        """Return the exception that was printed last; it need not have ended the child."""
        return next(_exceptions(reversed(self._lines)), None)


def _exceptions(lines: Iterable[str]) -> Iterator[str]:
    return (line.strip() for line in lines if is_exception(line))


def _write_all(target: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(target, data) :]
        except OSError:
            return  # the reader of our output is gone; the server continues
