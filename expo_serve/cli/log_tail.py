"""Passes a child's output on as it comes, and remembers enough of it to name the root cause of a failure."""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator

_KEPT_LINES = 2000
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
# vLLM's prefixes: "(EngineCore pid=12) ", "[rank0]: ", "ERROR 11-23 10:00:00 [core.py:12] "
_PREFIX = re.compile(r"^(\([\w-]+( pid=\d+)?\) |\[rank\d+\]: ?|[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] )*")
_EXCEPTION = re.compile(r"^(?P<type>[A-Za-z_][\w.]*(?:Error|Exception|Dead|Exit|Interrupt)): (?P<message>\S.*)")
_OURS = re.compile(r"^expo_serve\.errors\.")
# What vLLM says in the front end, or further up, about an error that another process had.
_ECHO = re.compile(
    r"Engine core initialization failed|EngineDeadError|EngineCore encountered an issue|"
    r"WorkerProc initialization failed|Executor failed|CancelledError|Engine process failed"
)
# Only where a line begins: requests can put a text into the middle of one.
_FATAL = re.compile(
    r"EngineCore failed to start|WorkerProc failed to start|EngineCore encountered a fatal error|"
    r"RuntimeError: Engine core initialization failed"
)
PREFIX_OF_OURS = "expo-serve: error: "


class LogTail:
    """The last lines of a child's output streams, each copied on by a thread of its own."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._threads: list[threading.Thread] = []
        self.failed = threading.Event()
        """Set once a line says that an engine or worker failed for good."""

    def follow(self, source: int, target: int) -> None:
        """Copy a file descriptor's bytes to another until its end."""
        thread = threading.Thread(target=self._copy, args=(source, target), daemon=True)
        thread.start()
        self._threads.append(thread)

    def finish(self, timeout: float = 2.0) -> None:
        """Wait until all that was written has been passed on."""
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
        line = _PREFIX.sub("", _ANSI.sub("", raw.decode(errors="replace")).strip("\r"))
        self._lines.append(line)
        if _FATAL.match(line):
            self.failed.set()

    def says_error(self) -> bool:
        """Whether the child ended with an error line of ours, so that nothing need be added."""
        return any(line.startswith(PREFIX_OF_OURS) for line in list(self._lines)[-5:])

    def root_cause(self) -> str | None:
        """The exception that began the failure: one of ours, without its class, else the first after vLLM
        called it fatal."""
        lines = list(self._lines)
        if own := next((line for line in lines if _OURS.match(line)), None):
            return own.partition(": ")[2]
        start = next((index for index, line in enumerate(lines) if _FATAL.match(line)), len(lines))
        return next(_exceptions(lines[start:]), None)

    def last_exception(self) -> str | None:
        """The exception that was printed last, which need not have ended anything."""
        return next(_exceptions(reversed(self._lines)), None)


def _exceptions(lines: Iterable[str]) -> Iterator[str]:
    return (line.strip() for line in lines if _EXCEPTION.match(line) and not _ECHO.search(line))


def _write_all(target: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(target, data) :]
        except OSError:
            return  # whoever read our output is gone; the server goes on
