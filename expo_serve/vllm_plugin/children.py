"""Tells how vLLM's child processes end: by which signal, or with which code.

Only a parent learns that. vLLM's API server starts ``VLLM::EngineCore``, which starts ``VLLM::Worker_TP0``; each of
them watches its own children here. vLLM waits for the same children, so nothing is taken from it: an exit status is
looked at with WNOWAIT, which leaves it where it is.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import connection, process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

_THREAD = "expo-serve-children"
_LOOK_SECONDS = 0.5
"""After which a child that is new is noticed; one that ends is noticed at once."""
_PATIENCE_SECONDS = 2.0
"""Time for vLLM to store the exit status that it has taken."""


class ChildEnd(NamedTuple):
    """The end of a child process."""

    name: str
    """Its title (``VLLM::EngineCore``), or its name in multiprocessing."""
    pid: int
    exitcode: int | None
    """A signal is negative, as in multiprocessing; None where nobody knows."""


def watch_children(tell: Callable[[ChildEnd], None]) -> None:
    """Start to watch the children of this process, in a daemon thread; once it is started, nothing happens.

    A fork does not inherit the thread, and can start its own.

    Args:
        tell: is called in that thread, with each child that has ended.
    """
    if all(thread.name != _THREAD for thread in threading.enumerate()):
        threading.Thread(target=ChildWatch(tell).run, name=_THREAD, daemon=True).start()


class ChildWatch:
    """Watches the children that multiprocessing has started in this process.

    Args:
        tell: is called with each child that has ended.
    """

    def __init__(self, tell: Callable[[ChildEnd], None]) -> None:
        self._tell = tell
        self._known: WeakSet[BaseProcess] = WeakSet()
        self._watched: dict[int, _Child] = {}
        """By a descriptor that can be read once the child has ended."""

    def run(self) -> None:
        """Watch until the end of this process."""
        while True:
            self.look(_LOOK_SECONDS)

    def look(self, seconds: float) -> None:
        """Look for new children, and wait for the end of one.

        Args:
            seconds: the most to wait.
        """
        self._find()
        for child in self._watched.values():
            child.read_title()
        if not self._watched:
            time.sleep(seconds)
        for end in connection.wait(list(self._watched), seconds):
            assert isinstance(end, int)
            os.close(end)
            self._tell(self._watched.pop(end).ended())

    def _find(self) -> None:
        for started in list(process._children):  # type: ignore[attr-defined] # active_children() would reap them
            if started not in self._known:
                self._known.add(started)
                self._watch(_Child(started))

    def _watch(self, child: _Child) -> None:
        try:
            self._watched[child.open_end()] = child
        except OSError:  # it has been reaped
            self._tell(child.ended())


class _Child:
    """A child that is watched.

    Args:
        started: multiprocessing's object.
    """

    def __init__(self, started: BaseProcess) -> None:
        self._popen: Any = started._popen  # type: ignore[attr-defined] # which outlives started.close()
        self._name = started.name
        self._short_name = b""

    def open_end(self) -> int:
        """Return a descriptor of ours that can be read once the child has ended.

        multiprocessing's own, the sentinel, can be held open by the children of a child that was forked.

        Raises:
            OSError: the child has been reaped.
        """
        if hasattr(os, "pidfd_open"):
            return os.pidfd_open(self._popen.pid)
        return os.dup(self._popen.sentinel)

    def read_title(self) -> None:
        """Read the title that the child has given itself; before that it may have its parent's."""
        pid = self._popen.pid
        short_name = _short_name(pid)
        if short_name == self._short_name:  # reading a title can hang, as it takes the lock of the memory map
            return
        self._short_name = short_name
        title = _title(pid)
        if "::" in title and title != _title(os.getpid()):
            self._name = title

    def ended(self) -> ChildEnd:
        """Return how the child has ended."""
        self._read_last_name()
        return ChildEnd(self._name, self._popen.pid, self._exitcode())

    def _read_last_name(self) -> None:
        """Read what is left of the title of a child that gave itself one a moment ago: its beginning."""
        short_name = _short_name(self._popen.pid)
        beginning = short_name.decode(errors="replace").strip()
        if "::" in beginning and short_name != _short_name(os.getpid()) and not self._name.startswith(beginning):
            title = f"{beginning.partition('::')[0]}::{self._name}"
            self._name = title if title.startswith(beginning) else beginning

    def _exitcode(self) -> int | None:
        """Return the child's exit code, and leave it to whoever waits for the child."""
        status = None
        with suppress(ChildProcessError):  # vLLM was faster, or the child is a fork server's
            status = os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if status is None:
            return self._stored_exitcode()
        return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status

    def _stored_exitcode(self) -> int | None:
        """Return the exit code that multiprocessing has stored, as soon as it has."""
        give_up = time.monotonic() + _PATIENCE_SECONDS
        while self._popen.returncode is None and time.monotonic() < give_up:
            time.sleep(0.01)
        code: int | None = self._popen.poll()  # of a fork server's child it can be read only once, so not before
        return code


def _title(pid: int) -> str:
    return _read(f"/proc/{pid}/cmdline").split(b"\0")[0].decode(errors="replace").strip()


def _short_name(pid: int) -> bytes:
    """Return the first 15 bytes of a process's name, which change when it gives itself a title."""
    return _read(f"/proc/{pid}/comm")


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError:
        return b""
