"""Faults that take away what a server needs: memory, disk, shared memory, open files."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from loadtests.chaos.effects import NoEffect, process_of, wait_until
from loadtests.chaos.faults import Kind
from loadtests.chaos.surroundings import SHARED_MEMORY, limit_file
from loadtests.chaos.victim import Victim

_EAT = "import sys, time; eaten = b'x' * int(sys.argv[1]); time.sleep(60)"
_SPARE_BYTES = 48 << 20
_BALLAST_BYTES = 400 << 20
_START_LIMIT_BYTES = 700 << 20
_SPARE_FILES, _CONNECTIONS = 4, 64
_CHUNK = 1 << 20


@contextmanager
def eat_memory(victim: Victim, kind: Kind) -> Iterator[None]:
    """Put the limit just above what the server holds, and let a neighbour in its control group eat the rest."""
    group = victim.place.group
    assert group is not None
    before = _kills(group)
    _limit(group, _held(group) + _SPARE_BYTES)
    code = (
        "import sys,time; b=[bytes(1<<20) and bytearray(b'x'*(1<<20)) for _ in range(int(sys.argv[1]))]; time.sleep(60)"
    )
    join = ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(group / "cgroup.procs")]
    neighbour = subprocess.Popen([*join, sys.executable, "-c", code, str(_BALLAST_BYTES >> 20)])
    try:
        wait_until(lambda: _kills(group) > before, 20, "the kernel has killed nothing in the control group")
        neighbour.kill()
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


@contextmanager
def limit_memory(victim: Victim, kind: Kind) -> Iterator[None]:
    """Allow less memory than a start needs."""
    group = victim.place.group
    assert group is not None
    _limit(group, _START_LIMIT_BYTES)
    yield
    if not _kills(group):
        raise NoEffect("the kernel has killed nothing in the control group")


def _limit(group: Path, limit: int) -> None:
    file = limit_file(group)
    assert file is not None
    file.write_text(str(limit))


def _held(group: Path) -> int:
    """Return the bytes of a control group that cannot be had back: no pages of files."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    anonymous = int(stat.get("total_rss", stat.get("anon", 0)))
    return anonymous + int(stat.get("total_shmem", stat.get("shmem", 0)))


def _kills(group: Path) -> int:
    """Return how many processes of a control group the kernel has killed for want of memory."""
    for name in ("memory.events", "memory.oom_control"):
        with suppress(OSError):
            lines = dict(line.split() for line in (group / name).read_text().splitlines())
            return int(lines["oom_kill"])
    return 0


@contextmanager
def fill_disk(victim: Victim, kind: Kind) -> Iterator[None]:
    """Leave no byte free where the log, TMPDIR and the caches are."""
    with _full(victim.place.log.parent):
        yield


@contextmanager
def fill_shm(victim: Victim, kind: Kind) -> Iterator[None]:
    """Leave no byte of shared memory free."""
    with _full(SHARED_MEMORY):
        yield


@contextmanager
def _full(folder: Path) -> Iterator[None]:
    ballast = folder / "ballast"
    try:
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(_CHUNK))
        with ballast.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(512))
        if os.statvfs(folder).f_bavail:
            raise NoEffect(f"{folder} is not full")
        yield
    finally:
        ballast.unlink(missing_ok=True)


@contextmanager
def limit_files(victim: Victim, kind: Kind) -> Iterator[None]:
    """Allow the process hardly more open files than it has, and connect many clients."""
    process = process_of(victim, kind.target)
    before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (process.num_fds() + _SPARE_FILES, before[1]))
    try:
        with ExitStack() as stack:
            for _ in range(_CONNECTIONS):
                connection = stack.enter_context(socket.socket())
                connection.setblocking(False)
                connection.connect_ex((victim.place.host, victim.port))
            yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)
