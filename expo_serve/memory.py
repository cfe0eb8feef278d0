"""Memory of this process and of the machine, from Linux's kernel; on other systems from psutil."""

from __future__ import annotations

from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def reset_peak() -> None:
    """Reset the kernel's peak resident size to the current size, if permitted."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return  # not Linux, or not permitted: the peak then counts from the start of the process


def peak_resident_bytes() -> int:
    """Return the largest resident size since :func:`reset_peak`, in bytes."""
    return _status_bytes("VmHWM") or psutil.Process().memory_info().rss


def anonymous_bytes() -> int:
    """Return the resident memory of this process that is not backed by a file, in bytes."""
    return _status_bytes("RssAnon") or psutil.Process().memory_info().rss


def available_bytes() -> int:
    """Return the memory available without swapping, within the limit of the container, in bytes."""
    available = psutil.virtual_memory().available
    try:
        limit = int(_CGROUP_LIMIT.read_text())
        used = int(_CGROUP_LIMIT.with_name("memory.current").read_text())
    except (OSError, ValueError):
        return available
    return min(available, max(limit - used, 0))


def _status_bytes(key: str) -> int:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
