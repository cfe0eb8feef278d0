"""A tree of processes: find it, end it, and leave nothing of it behind. Linux does the most here."""

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
# Names that Python's multiprocessing, torch and vLLM give to segments: never a file of the user's.
_SEGMENT = re.compile(r"(psm_|sem\.mp-|torch_|vllm_(dist|offload|ec)_)")


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that none can slip away."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans(keep: int = 0) -> None:
    """Collect the exits of adopted children; ``keep`` is the child whose exit somebody else awaits."""
    with suppress(ChildProcessError):  # no child at all
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == keep:
                return
            os.waitpid(ended.si_pid, 0)


def descendants(pid: int) -> list[psutil.Process]:
    """All living descendants of a process."""
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if _state(child) not in (psutil.STATUS_ZOMBIE, None)]


def titled(pid: int, prefix: str) -> dict[int, str]:
    """The descendants that gave themselves a title beginning with ``prefix``, by process id.

    A fork inherits its parent's title; helpers that come and go so are left out.
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
    """End every descendant of a process at once, and the shared memory they leave.

    Python's resource trackers come last: they end by themselves, cleaning up, once the others are gone.

    Args:
        pid: the process, which stays.
        segments: shared memory that descendants held which have ended since (:func:`segments_of`).
        wait: seconds that the resource trackers get.
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
    """Shared memory that a process's descendants hold now."""
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
