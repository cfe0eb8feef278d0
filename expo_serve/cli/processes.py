"""Finds the processes below a process, and ends them and their shared memory. Complete on Linux only."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil

from expo_serve.cli.printable import printable
from expo_serve.errors import ServeError

_PR_SET_CHILD_SUBREAPER = 36
_SHARED_MEMORY = Path("/dev/shm")
# Names that Python's multiprocessing, torch and vLLM give to segments; a user's own file has none of them.
_SEGMENT = re.compile(r"(psm_|sem\.mp-|torch_|vllm_(dist|offload|ec)_)")
_END_SECONDS = 10.0
"""Time for a killed process to notice; one that hangs in the kernel, in a driver for example, never does."""
_EXIT_SECONDS = 60.0
"""Time for one that has noticed: the kernel may have hundreds of gigabytes to free."""
_PF_EXITING = 4  # include/linux/sched.h
_READ_SECONDS = 1.0

Found = TypeVar("Found")


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent ends, so that all of them can be found."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans(keep: int = 0) -> list[int]:
    """Reap children that have ended, except ``keep``, which its own Popen object waits for; returns their ids."""
    reaped: list[int] = []
    with suppress(ChildProcessError):  # there is no child
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == keep:
                break
            os.waitpid(ended.si_pid, 0)
            reaped.append(ended.si_pid)
    return reaped


def descendants(pid: int) -> list[psutil.Process]:
    """Return all living descendants of a process.

    Raises:
        psutil.Error: the system does not show its processes.
        OSError: it cannot at the moment, for lack of file descriptors for example.
    """
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if _state(child) not in (psutil.STATUS_ZOMBIE, None)]


def titled(pid: int, prefix: str) -> dict[int, str]:
    """Return the descendants that set their own title, if it begins with ``prefix``, by process id.

    A fork inherits its parent's title, so short-lived helper processes are recognised by it and left out.
    """
    living = descendants(pid)
    commands = {process.pid: _title(process) for process in living}
    return {
        process.pid: title
        for process in living
        if (title := commands.get(process.pid, "")).startswith(prefix) and title != commands.get(_parent(process))
    }


def _title(process: psutil.Process) -> str:
    try:
        return (process.cmdline() or [""])[0].strip()
    except psutil.Error:
        return ""


def _parent(process: psutil.Process) -> int:
    try:
        return int(process.ppid())
    except psutil.Error:
        return 0


def end_descendants(
    pid: int, segments: Iterable[Path] = (), wait: float = 4.0, limit: float = _END_SECONDS, spare: int = 0
) -> None:
    """Kill every descendant of a process, and remove the shared memory that they leave.

    Python's resource trackers are spared at first: once all other processes are gone, they clean up and end. They
    alone know the names of semaphores, which nobody has mapped.

    Args:
        pid: the process, which is not killed itself.
        segments: shared memory of descendants that have already ended, from :class:`Survey`.
        wait: seconds after the end of all others after which the resource trackers are killed too.
        limit: seconds after which processes that do not even begin to end are left behind.
        spare: id of a process that is not ended.

    Raises:
        ServeError: some are left behind; it names them.
    """
    segments = set(segments)
    began = spared = time.monotonic()
    while (living := [one for one in descendants(pid) if one.pid != spare]) and not _is_in_vain(
        living, time.monotonic() - began, limit
    ):
        segments |= in_time(partial(_segments, living), set())
        trackers: set[psutil.Process] = in_time(partial(_trackers, living), set())
        others = [process for process in living if process not in trackers]
        if others:
            spared = min(time.monotonic(), began + limit / 2)
        victims = others if time.monotonic() < spared + wait else living
        for process in victims:
            with suppress(psutil.Error):  # gone meanwhile, or of another user
                process.kill()
        psutil.wait_procs(victims or living, timeout=0.2)
        reap_orphans()
    for segment in segments:
        with suppress(OSError):
            segment.unlink()
    if living:
        raise _left_behind(living, time.monotonic() - began)


def _is_in_vain(living: list[psutil.Process], seconds: float, limit: float) -> bool:
    """Return whether it is no use to wait any longer."""
    return seconds > _EXIT_SECONDS or (seconds > limit and not all(_is_ending(process.pid) for process in living))


def _is_ending(pid: int) -> bool:
    """Return whether the kernel is about to free what a process holds (or it has ended)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return True
    return bool(int(stat.rpartition(")")[2].split()[6]) & _PF_EXITING)  # field 9 of proc_pid_stat(5)


def _left_behind(living: list[psutil.Process], seconds: float) -> ServeError:
    names = ", ".join(f"{process.pid} ({_hangs_in(process)})" for process in living)
    processes, are, they = ("process", "is", "it") if len(living) == 1 else ("processes", "are", "they")
    return ServeError(
        f"{processes} {names} did not end within {seconds:.0f} s of SIGKILL and {are} left behind, with all that "
        f"{they} may hold (memory, devices)"
    )


def _hangs_in(process: psutil.Process) -> str:
    """Return a process's name and state, and where in the kernel it is, as far as that may be read.

    None of it needs the process's memory map.
    """
    folder = f"/proc/{process.pid}"
    parts = (_line_of(f"{folder}/comm"), _state(process), _line_of(f"{folder}/wchan").strip("0"))
    return ", ".join(part for part in parts if part)


def _line_of(file: str) -> str:
    try:
        return printable(Path(file).read_text(errors="replace"))
    except OSError:
        return ""


def in_time(work: Callable[[], Found], otherwise: Found, seconds: float = _READ_SECONDS) -> Found:
    """Return what some work gives, or something else where it takes too long; a thread goes on with it then.

    A process that hangs in the kernel may hold the lock of its memory map. Whoever asks for its command line or its
    mappings then hangs too, and so does whoever removes a file from a file system that hangs.
    """
    found: list[Found] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else otherwise


class Survey:
    """What can be read of a process's descendants through their memory maps, read in the background.

    Args:
        pid: the process.
        prefix: of the titles that count, see :func:`titled`.
    """

    def __init__(self, pid: int, prefix: str) -> None:
        self._pid, self._prefix = pid, prefix
        self._thread: threading.Thread | None = None
        self.titles: dict[int, str] = {}
        """Of all that ever lived, by process id."""
        self.segments: set[Path] = set()
        """Shared memory that any of them has ever mapped."""

    def go_on(self) -> None:
        """Begin to read all of it again, unless that is still under way."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()

    def _read(self) -> None:
        with suppress(psutil.Error, OSError):  # no file descriptor free, for example: the next time
            self.titles = self.titles | titled(self._pid, self._prefix)
            self.segments = self.segments | _segments(descendants(self._pid))


def _segments(living: Iterable[psutil.Process]) -> set[Path]:
    found = set()
    for process in living:
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
        except OSError:
            continue
        paths = {line.rpartition(" ")[2] for line in maps.splitlines() if f" {_SHARED_MEMORY}/" in line}
        found |= {Path(path) for path in paths if _SEGMENT.match(Path(path).name)}
    return {path for path in found if path.parent == _SHARED_MEMORY}


def _trackers(living: Iterable[psutil.Process]) -> set[psutil.Process]:
    return {process for process in living if _is_tracker(process)}


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return any("resource_tracker" in part for part in process.cmdline())
    except psutil.Error:
        return False


def _state(process: psutil.Process) -> str | None:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return None
