"""What the kernel says about a process's memory and the machine's. Linux; elsewhere what psutil knows."""

from __future__ import annotations

from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def reset_peak() -> None:
    """Set the kernel's mark of the peak resident size back to the present size, where that is allowed."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return  # not Linux, or not permitted: the peak is then that since the process began


def peak_resident_bytes() -> int:
    """Largest resident size since :func:`reset_peak`, in bytes."""
    return _status_bytes("VmHWM") or psutil.Process().memory_info().rss


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs, in bytes."""
    return _status_bytes("RssAnon") or psutil.Process().memory_info().rss


def available_bytes() -> int:
    """Memory that can be had without swapping: the machine's, or what the container's limit leaves."""
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
