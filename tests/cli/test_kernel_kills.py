"""What the kernel does for lack of memory is noticed: in real control groups where they may be made, and in fakes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from expo_serve.cli.kernel_kills import OutOfMemory, describe_exit

MEMORY_V1 = Path("/sys/fs/cgroup/memory")
ROOT_V2 = Path("/sys/fs/cgroup")
LIMIT = 64 << 20
NO_LIMIT_V1 = str(0x7FFFFFFFFFFFF000)


@pytest.mark.parametrize(
    ("exitcode", "words"),
    [
        (0, "ended with code 0"),
        (3, "ended with code 3"),
        (137, "ended with code 137"),
        (-signal.SIGKILL, "was killed by SIGKILL"),
        (-signal.SIGTERM, "was killed by SIGTERM"),
        (-signal.SIGSEGV, "was killed by SIGSEGV (segmentation fault)"),
        (-signal.SIGBUS, "was killed by SIGBUS (bus error: a mapped file was truncated, or shared memory is full)"),
        (-signal.SIGILL, "was killed by SIGILL (illegal instruction: built for another CPU)"),
        (-40, "was killed by signal 40"),
        (-99, "was killed by signal 99"),
    ],
)  # fmt: skip
def test_exit_in_words(exitcode: int, words: str) -> None:
    assert describe_exit(exitcode) == words


def test_exit_of_a_real_process() -> None:
    for script, words in (("exit 3", "ended with code 3"), ("kill -9 $$", "was killed by SIGKILL")):
        assert describe_exit(subprocess.run(["sh", "-c", script], check=False).returncode) == words


class Machine:
    """A fake root of the file system, as the kernel shows it in a container or outside."""

    def __init__(self, root: Path, own: str, mounts: str) -> None:
        self.root = root
        self.write("proc/self/cgroup", own)
        self.write("proc/self/mountinfo", mounts)
        self.write("proc/meminfo", "MemTotal:       24000000 kB\nMemFree:        1 kB\n")
        self.machine_kills(0)

    def write(self, file: str, text: str) -> None:
        """Write a file."""
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def machine_kills(self, count: int) -> None:
        """The kernel's counter of the machine."""
        self.write("proc/vmstat", f"nr_free_pages 5\noom_kill {count}\n")

    def v2(self, group: str, *, kills: int = 0, hits: int = 0, limit: str = "max") -> None:
        """A control group of version 2."""
        folder = f"sys/fs/cgroup/{group}"
        self.write(f"{folder}/memory.events", f"low 0\nhigh 0\nmax 9\noom {hits + 5}\noom_kill {kills}\n")
        self.write(f"{folder}/memory.events.local", f"low 0\nhigh 0\nmax 9\noom {hits}\noom_kill {kills}\n")
        self.write(f"{folder}/memory.max", f"{limit}\n")

    def v1(self, group: str, *, kills: int = 0, hits: int = 0, limit: str = NO_LIMIT_V1) -> None:
        """A control group of version 1."""
        folder = f"sys/fs/cgroup/memory/{group}"
        self.write(f"{folder}/memory.oom_control", f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n")
        self.write(f"{folder}/memory.failcnt", f"{hits}\n")
        self.write(f"{folder}/memory.limit_in_bytes", f"{limit}\n")


MOUNT_V2 = "30 23 0:27 {top} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNT_V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "35 31 0:31 {top} /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
    "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
    "41 31 0:38 {top} /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
)


@pytest.fixture
def container(tmp_path: Path) -> Machine:
    """A container of version 2 with its own view of control groups."""
    machine = Machine(tmp_path, "0::/\n", MOUNT_V2.format(top="/"))
    machine.v2("", limit="2000000000")
    return machine


def test_kill_at_the_containers_limit(container: Machine) -> None:
    watcher = OutOfMemory(container.root)
    assert watcher.since_start() is None
    container.v2("", kills=1, hits=1, limit="2000000000")
    assert watcher.since_start() == ("out of memory: the kernel killed a process (limit of the container: 2.0 GB)")
    assert OutOfMemory(container.root).since_start() is None, "what was before is over"


def test_limit_that_was_in_the_way_without_a_kill_is_nothing(container: Machine) -> None:
    watcher = OutOfMemory(container.root)
    container.v2("", hits=3, limit="2000000000")
    assert watcher.since_start() is None


def test_kill_in_a_container_because_the_machine_is_full(container: Machine) -> None:
    watcher = OutOfMemory(container.root)
    container.v2("", kills=2, limit="2000000000")
    assert watcher.since_start() == ("out of memory: the kernel killed a process (memory of the machine: 24.6 GB)")


def test_kill_elsewhere_on_the_machine_is_not_ours(container: Machine) -> None:
    watcher = OutOfMemory(container.root)
    container.machine_kills(7)
    assert watcher.since_start() is None


def test_limit_of_a_group_around_ours(tmp_path: Path) -> None:
    """A pod's, which holds the container's group, or a slice of systemd."""
    machine = Machine(tmp_path, "0::/pod/container\n", MOUNT_V2.format(top="/"))
    machine.v2("pod", limit="3000000000")
    machine.v2("pod/container")
    watcher = OutOfMemory(machine.root)
    machine.v2("pod", kills=1, hits=1, limit="3000000000")
    machine.v2("pod/container", kills=1)
    assert watcher.since_start() == ("out of memory: the kernel killed a process (limit of the container: 3.0 GB)")


def test_older_version_2_has_one_file_of_events(container: Machine) -> None:
    (container.root / "sys/fs/cgroup/memory.events.local").unlink()
    watcher = OutOfMemory(container.root)
    container.v2("", kills=1, hits=1, limit="2000000000")
    (container.root / "sys/fs/cgroup/memory.events.local").unlink()
    assert "limit of the container: 2.0 GB" in str(watcher.since_start())


@pytest.mark.parametrize(
    ("own", "top", "group"),
    [
        ("/", "/", ""),
        ("/pod/ours", "/", "pod/ours"),
        ("/docker/ours", "/docker/ours", ""),  # no view of its own: the mount is a part of the machine's tree
        ("/docker/ours/inner", "/docker/ours", "inner"),
        ("/docker/ours", "/docker/our", ""),
        ("/../ours", "/", ""),
        ("/not/visible", "/", ""),
    ],
)
def test_our_group_is_found(tmp_path: Path, own: str, top: str, group: str) -> None:
    cgroup = f"12:cpuset:/elsewhere\n4:memory:{own}\n0::/x\n"
    machine = Machine(tmp_path, cgroup, MOUNT_V1.format(top=top))
    machine.v1(group, limit="1500000000")
    watcher = OutOfMemory(machine.root)
    machine.v1(group, kills=1, hits=20, limit="1500000000")
    assert watcher.since_start() == ("out of memory: the kernel killed a process (limit of the container: 1.5 GB)")


def test_version_1_without_a_limit(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "4:cpu,memory:/\n", MOUNT_V1.format(top="/"))
    machine.v1("")
    watcher = OutOfMemory(machine.root)
    machine.v1("", kills=1)
    assert "memory of the machine: 24.6 GB" in str(watcher.since_start())


def test_machines_counter_where_no_group_counts(tmp_path: Path) -> None:
    """The root of version 2 has no files about memory."""
    machine = Machine(tmp_path, "0::/\n", MOUNT_V2.format(top="/"))
    watcher = OutOfMemory(machine.root)
    assert watcher.since_start() is None
    machine.machine_kills(1)
    assert watcher.since_start() == "out of memory: the kernel killed a process of this machine"


def test_no_kernel_that_counts(tmp_path: Path) -> None:
    assert OutOfMemory(tmp_path).since_start() is None


def test_nothing_has_happened_here() -> None:
    """On this machine, with its real files."""
    assert OutOfMemory().since_start() is None


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A control group with a limit, inside the one that these tests run in where that is possible."""
    parent = MEMORY_V1 if MEMORY_V1.is_dir() else ROOT_V2
    group = parent / f"expo-serve-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        file = group / ("memory.limit_in_bytes" if parent == MEMORY_V1 else "memory.max")
        if not file.exists():
            pytest.skip("control groups do not limit memory here")
        file.write_text(str(LIMIT))
        yield group
    finally:
        deadline = time.monotonic() + 10
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        group.rmdir()


SCRIPT = """
import os, subprocess, sys
from expo_serve.cli.kernel_kills import OutOfMemory, describe_exit
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
watcher = OutOfMemory()
assert watcher.since_start() is None
eater = "open('/proc/self/oom_score_adj', 'w').write('1000'); b'x' * (1 << 30)"
child = subprocess.run([sys.executable, "-c", eater])
print(describe_exit(child.returncode))
print(watcher.since_start())
"""


def test_real_kill(real_group: Path) -> None:
    if psutil.virtual_memory().available < 4 * LIMIT:
        pytest.skip("this machine has too little memory left itself")
    command = [sys.executable, "-c", SCRIPT, str(real_group)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines() == [
        "was killed by SIGKILL",
        f"out of memory: the kernel killed a process (limit of the container: {LIMIT / 1e9:.1f} GB)",
    ]
