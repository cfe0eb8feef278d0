"""What is put around a server so that a fault can be done to it and to nothing else.

The harness runs in namespaces of its own for mounts and network (:func:`enter_namespaces`), so nothing of this is seen
by the rest of the machine, and all of it is gone when the harness is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.chaos import clock

MODELS = Path(__file__).parents[2] / ".demo"
SHARED_MEMORY = Path("/dev/shm")
DISK_BYTES = 64 << 20
SHM_BYTES = 512 << 20
_INSIDE = "EXPO_CHAOS_INSIDE"
_MARKER = "loadtests.chaos"
_HOST_ADDRESS, _SERVER_ADDRESS = "10.231.77.1", "10.231.77.2"
_PIPE_BYTES = 1 << 16


class Impossible(Exception):
    """This machine lacks what a fault needs; the message says what."""


@dataclass
class Place:
    """Where a server runs: what its command line, its environment and its files are."""

    folder: Path
    host: str = "127.0.0.1"
    prefix: list[str] = field(default_factory=list)
    """Words before the command; each program among them replaces itself by the next one."""
    environment: dict[str, str] = field(default_factory=dict)
    base: Path = MODELS / "base"
    aligned: Path = MODELS / "aligned"
    temporary: Path = Path()
    log: Path = Path()
    pipe: LogPipe | None = None
    group: Path | None = None
    clock: Path | None = None
    link: str | None = None

    def __post_init__(self) -> None:
        self.temporary, self.log = self.folder / "t", self.folder / "log"


def enter_namespaces(module: str) -> str:
    """Start this program anew in namespaces of its own for mounts and network, where that is possible.

    Args:
        module: what is run, with the same arguments.

    Returns:
        Why it was not possible; empty where it was, in the new program.
    """
    if os.environ.get(_INSIDE) == "1":
        _prepare_namespaces()
        return ""
    unshare = ["unshare", "--mount", "--net", "--propagation", "private"]
    try:
        tried = subprocess.run([*unshare, "true"], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"unshare: {error.strerror}"
    if tried.returncode:
        return f"namespaces: {tried.stderr.strip()}"
    words = [*unshare, sys.executable, "-m", module, *sys.argv[1:]]
    os.execvpe(unshare[0], words, {**os.environ, _INSIDE: "1"})


def _prepare_namespaces() -> None:
    _do("ip", "link", "set", "lo", "up")
    _mount("-o", f"size={SHM_BYTES}", "tmpfs", str(SHARED_MEMORY))


@contextmanager
def place_for(needs: frozenset[str], folder: Path) -> Iterator[Place]:
    """Give a server's surroundings, in an empty folder.

    Raises:
        Impossible: this machine lacks something.
    """
    place = Place(folder)
    place.temporary.mkdir(parents=True)
    with ExitStack() as stack:
        for need in sorted(needs):
            stack.enter_context(NEEDS[need](place))
        place.environment["TMPDIR"] = str(place.temporary)
        yield place


def why_not(needs: frozenset[str], folder: Path) -> str:
    """Return what this machine lacks of the surroundings; empty if nothing."""
    try:
        with place_for(needs, folder):
            return ""
    except Impossible as error:
        return str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _memory(place: Place) -> Iterator[None]:
    """A control group for memory below the harness's own, so that whatever limits the harness goes on to hold."""
    place.group = group = _own_group() / f"{_MARKER}.{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise Impossible(f"no control group can be made in {group.parent}: {error.strerror}") from None
    try:
        if limit_file(group) is None:
            raise Impossible(f"{group.parent} does not hand the memory controller on")
        place.prefix += ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(group / "cgroup.procs")]
        yield
    finally:
        with suppress(OSError):  # a process is left in it, which is reported
            group.rmdir()


def _own_group() -> Path:
    """Return the folder of this process's control group for memory, of version 1 or else 2."""
    groups = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        root, mounted = left.split()[3:5]
        kind, _, options = right.split()[:3]
        name = "memory" if kind == "cgroup" and "memory" in options.split(",") else "" if kind == "cgroup2" else None
        if name is not None and name in groups:
            folder = Path(mounted) / os.path.relpath(groups[name], root)
            if kind == "cgroup" or "memory" in (folder / "cgroup.controllers").read_text().split():
                return folder
    raise Impossible("no control group with a memory controller is mounted")


def limit_file(group: Path) -> Path | None:
    """Return the file that limits a control group's memory, in bytes."""
    files = (group / "memory.max", group / "memory.limit_in_bytes")
    return next((file for file in files if file.exists()), None)


@contextmanager
def _disk(place: Place) -> Iterator[None]:
    """A small file system with the log, TMPDIR and the caches on it."""
    small = place.folder / "disk"
    small.mkdir()
    _mount("-o", f"size={DISK_BYTES}", "tmpfs", str(small))
    try:
        place.temporary, place.log = small / "t", small / "log"
        place.temporary.mkdir()
        place.environment["XDG_CACHE_HOME"] = str(small / "cache")
        yield
    finally:
        _do("umount", "--lazy", str(small))


@contextmanager
def _shm(place: Place) -> Iterator[None]:
    """Shared memory that nobody else uses: the harness has its own mount."""
    if os.environ.get(_INSIDE) != "1":
        raise Impossible("/dev/shm is the whole machine's: mounting another one needs root")
    yield


@contextmanager
def _network(place: Place) -> Iterator[None]:
    """A network of the server's own, which a pair of links joins to the harness's."""
    if os.environ.get(_INSIDE) != "1":
        raise Impossible("a network of its own needs root")
    name, near, far = "expo-chaos", "chaos-near", "chaos-far"
    _mount("tmpfs", "/run")  # where the names of networks are kept
    _do("ip", "netns", "add", name)
    try:
        _do("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        _do("ip", "address", "add", f"{_HOST_ADDRESS}/24", "dev", near)
        _do("ip", "link", "set", near, "up")
        _do("ip", "-n", name, "address", "add", f"{_SERVER_ADDRESS}/24", "dev", far)
        for device in ("lo", far):
            _do("ip", "-n", name, "link", "set", device, "up")
        place.host, place.link = _SERVER_ADDRESS, near
        place.prefix += ["nsenter", f"--net=/run/netns/{name}"]
        yield
    finally:
        with suppress(Impossible):
            _do("ip", "link", "delete", near)  # else it stays until the kernel has cleaned up behind the network
        _do("ip", "netns", "delete", name)
        _do("umount", "--lazy", "/run")


@contextmanager
def _clock(place: Place) -> Iterator[None]:
    """The wall clock of the server alone; the steady clock stays as it is."""
    place.clock = place.folder / "clock"
    place.clock.write_text("+7200\n")
    if trouble := clock.trouble(place.clock):
        raise Impossible(trouble)
    place.clock.write_text("+0\n")
    place.environment |= clock.environment(place.clock)
    yield


@contextmanager
def _copies(place: Place) -> Iterator[None]:
    """Checkpoints that may be damaged."""
    for side in ("base", "aligned"):
        shutil.copytree(MODELS / side, place.folder / side)
    place.base, place.aligned = place.folder / "base", place.folder / "aligned"
    yield


@contextmanager
def _pipe(place: Place) -> Iterator[None]:
    """A log that goes through a pipe, whose reader can stop to read."""
    place.pipe = LogPipe(place.log)
    try:
        yield
    finally:
        place.pipe.close()


class LogPipe:
    """Writes what comes through a pipe into a file, as long as it is let."""

    def __init__(self, log: Path) -> None:
        self._file = log.open("wb", buffering=0)
        self._reads = threading.Event()
        self._reads.set()
        self.end, self.writer = os.pipe()
        threading.Thread(target=self._copy, daemon=True).start()

    def stall(self) -> None:
        """Read nothing more."""
        self._reads.clear()

    def go_on(self) -> None:
        """Read again."""
        self._reads.set()

    def close(self) -> None:
        """Read to the end; it comes when no process writes any more."""
        os.close(self.writer)
        self.go_on()

    def _copy(self) -> None:
        with self._file as file:
            while self._reads.wait() and (data := os.read(self.end, _PIPE_BYTES)):
                file.write(data)
        os.close(self.end)


NEEDS: dict[str, Callable[[Place], AbstractContextManager[None]]] = {
    "memory": _memory,
    "disk": _disk,
    "shm": _shm,
    "network": _network,
    "clock": _clock,
    "copies": _copies,
    "pipe": _pipe,
}


def _mount(*words: str) -> None:
    """Mount a small file system in memory."""
    _do("mount", "-t", "tmpfs", *words)


def _do(*words: str) -> None:
    """Run a command.

    Raises:
        Impossible: it is not there, or is not allowed.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Impossible(f"{words[0]}: {error.strerror}") from None
    if done.returncode:
        raise Impossible(f"{' '.join(words[:3])}: {done.stderr.strip()}")
