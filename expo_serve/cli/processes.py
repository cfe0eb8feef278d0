"""Finds the processes below a process, and ends them and their shared memory. Complete on Linux only."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_SHARED_MEMORY = Path("/dev/shm")
# Names that Python's multiprocessing, torch and vLLM give to segments; a user's own file has none of them.
_SEGMENT = re.compile(r"(psm_|sem\.mp-|torch_|vllm_(dist|offload|ec)_)")


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent ends, so that all of them can be found."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans(keep: int = 0) -> None:
    """Reap adopted children that have ended, except ``keep``, which its own Popen object waits for."""
    with suppress(ChildProcessError):  # there is no child
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == keep:
                return
            os.waitpid(ended.si_pid, 0)


def descendants(pid: int) -> list[psutil.Process]:
    """Return all living descendants of a process."""
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


def end_descendants(pid: int, segments: Iterable[Path] = (), wait: float = 2.0) -> None:
    """Kill every descendant of a process, and remove the shared memory that they leave.

    Python's resource trackers are spared at first: once all other processes are gone, they clean up and end.

    Args:
        pid: the process, which is not killed itself.
        segments: shared memory of descendants that have already ended, from :func:`segments_of`.
        wait: seconds after which the resource trackers are killed too.
    """
    segments = set(segments)
    deadline = time.monotonic() + wait
    while living := descendants(pid):
        segments |= _segments(living)
        trackers = {process for process in living if _is_tracker(process)}
        victims = living if time.monotonic() > deadline else [p for p in living if p not in trackers]
        for process in victims:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(victims or living, timeout=0.2)
        reap_orphans()
    for segment in segments:
        segment.unlink(missing_ok=True)


def segments_of(pid: int) -> set[Path]:
    """Return the shared memory that the descendants of a process have mapped now."""
    return _segments(descendants(pid))


def _segments(living: Iterable[psutil.Process]) -> set[Path]:
    found = set()
    for process in living:
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
        except OSError:
            continue
        paths = {line.rpartition(" ")[2] for line in maps.splitlines() if f" {_SHARED_MEMORY}/" in line}
        found |= {Path(path) for path in paths if _SEGMENT.match(Path(path).name)}
    return {path for path in found if path.parent == _SHARED_MEMORY}


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
