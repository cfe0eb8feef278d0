"""Says why a process is gone: the signal that ended it, and whether the kernel killed it for lack of memory.

Nobody tells a process that the kernel's out-of-memory killer has ended another one; only counters grow.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_WORDS = {
    signal.SIGSEGV: "segmentation fault",
    signal.SIGBUS: "bus error: a mapped file was truncated, or shared memory is full",
    signal.SIGILL: "illegal instruction: built for another CPU",
    signal.SIGFPE: "arithmetic error",
    signal.SIGABRT: "aborted itself",
}
_NO_LIMIT = 1 << 60
"""Version 1 of control groups writes a number above this one where there is no limit."""


def describe_exit(exitcode: int) -> str:
    """Return how a process has ended, to follow its name: ``was killed by SIGKILL``, ``ended with code 3``.

    Args:
        exitcode: as in ``subprocess`` and ``multiprocessing``, where a signal is negative.
    """
    if exitcode >= 0:
        return f"ended with code {exitcode}"
    try:
        number = signal.Signals(-exitcode)
    except ValueError:
        return f"was killed by signal {-exitcode}"
    words = _WORDS.get(number)
    return f"was killed by {number.name}" + (f" ({words})" if words else "")


class _Group(NamedTuple):
    """A control group that limits memory."""

    folder: Path
    version: int

    def kills(self) -> int | None:
        """Return how many processes the kernel has killed here for lack of memory; None if nobody counts."""
        return _count(self.folder / ("memory.events" if self.version == 2 else "memory.oom_control"), "oom_kill")

    def hits(self) -> int:
        """Return how often its limit was in the way."""
        if self.version == 2:
            own = _count(self.folder / "memory.events.local", "oom")
            return own if own is not None else _count(self.folder / "memory.events", "oom") or 0
        return _number(self.folder / "memory.failcnt") or 0

    def limit(self) -> int | None:
        """Return the most memory that its processes may have, in bytes; None without a limit."""
        limit = _number(self.folder / ("memory.max" if self.version == 2 else "memory.limit_in_bytes"))
        return limit if limit is not None and limit < _NO_LIMIT else None


class OutOfMemory:
    """Notices what the kernel's out-of-memory killer does to processes in the control group of this one.

    Where no control group counts (the root of version 2, or a sandbox), the whole machine's counter stands for it.

    Args:
        root: of the file system; another one for tests.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._groups = [group for group in _groups(root) if group.kills() is not None]
        self._kills = [group.kills() or 0 for group in self._groups]
        self._hits = [group.hits() for group in self._groups]
        self._machine_kills = self._count_of_machine()

    def since_start(self) -> str | None:
        """Return what the kernel has done since this object was made, in one phrase; None if nothing."""
        if not self._groups:
            grown = self._count_of_machine() > self._machine_kills
            return "out of memory: the kernel killed a process of this machine" if grown else None
        if all((group.kills() or 0) <= before for group, before in zip(self._groups, self._kills, strict=True)):
            return None
        return f"out of memory: the kernel killed a process ({self._cause()})"

    def _cause(self) -> str:
        """Return what ran out: the limit of a control group that was in the way, or else the machine's memory."""
        limits = [
            limit
            for group, before in zip(self._groups, self._hits, strict=True)
            if group.hits() > before and (limit := group.limit()) is not None
        ]
        if limits:
            return f"limit of the container: {_in_gb(min(limits))}"
        total = _count(self._root / "proc/meminfo", "MemTotal:")
        return f"memory of the machine: {_in_gb(total * 1024)}" if total else "of the machine"

    def _count_of_machine(self) -> int:
        return _count(self._root / "proc/vmstat", "oom_kill") or 0


def _groups(root: Path) -> Iterator[_Group]:
    """Yield this process's control groups that limit memory, the innermost first, as far as they can be seen."""
    own = dict(_own_paths(root))
    for version, mount, top in _mounts(root):
        if version not in own:
            continue
        folder = _within(mount, own[version], top)
        while folder != mount:
            yield _Group(folder, version)
            folder = folder.parent
        yield _Group(mount, version)


def _own_paths(root: Path) -> Iterator[tuple[int, str]]:
    """Yield the paths of this process's control groups, by their version (cgroups(7))."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield 2, path
        elif "memory" in controllers.split(","):
            yield 1, path


def _mounts(root: Path) -> Iterator[tuple[int, Path, str]]:
    """Yield where control groups are mounted: version, folder, and which group that is (proc_pid_mountinfo(5))."""
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, source = line.partition(" - ")
        top, folder = mount.split()[3:5]
        kind, *_, options = source.split()
        version = 2 if kind == "cgroup2" else 1 if kind == "cgroup" and "memory" in options.split(",") else None
        if version is not None:
            yield version, root / folder.lstrip("/"), top


def _within(mount: Path, own: str, top: str) -> Path:
    """Return the folder of a control group below a mount.

    In a container it may be the mount itself, however it is called outside.
    """
    if not PurePosixPath(own).is_relative_to(top):
        return mount
    folder = mount / PurePosixPath(own).relative_to(top)
    return folder if ".." not in folder.parts and folder.is_dir() else mount


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _count(file: Path, key: str) -> int | None:
    """Return the number behind a key in a file of ``key number`` lines."""
    return next((int(line.split()[1]) for line in _lines(file) if line.split()[:1] == [key]), None)


def _number(file: Path) -> int | None:
    """Return the number that is all of a file; None if there is another word, such as ``max``."""
    text = "".join(_lines(file)).strip()
    return int(text) if text.isdigit() else None


def _in_gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
