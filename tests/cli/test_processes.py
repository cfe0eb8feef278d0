"""The end of processes: all of them, also one that the kernel does not let go; then in bounded time and by its name."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from expo_serve.cli import processes
from expo_serve.errors import ServeError

FREEZER = Path("/sys/fs/cgroup/freezer")
"""Of version 1: a frozen process ends by no signal, as one that hangs in a driver. Under version 2 it would."""
LINE = r"process {} \(sleep, .*\) did not end within \d s of SIGKILL and is left behind, with all that it may hold"


@pytest.fixture
def root() -> Iterator[int]:
    """A process with a child of two children, of which one has lost its parent."""
    script = "sh -c 'sleep 600 & sleep 600 & wait' & sh -c 'sleep 600 &'; echo; wait"
    code = "from expo_serve.cli import processes; processes.adopt_orphans(); import subprocess, sys\n"
    code += f"child = subprocess.Popen(['sh', '-c', {script!r}], stdout=subprocess.PIPE)\n"
    code += "child.stdout.readline()\nprint(flush=True)\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


def test_all_descendants_end(root: int) -> None:
    family = processes.descendants(root)
    while len(family) < 5:  # two shells, three sleepers
        family = processes.descendants(root)
    processes.end_descendants(root)
    assert [process for process in family if processes._state(process) not in (psutil.STATUS_ZOMBIE, None)] == []
    assert psutil.pid_exists(root)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Freeze a process; killed or not, it stays until the end of the context."""
    group = FREEZER / f"test-{pid}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no freezer of control groups here: {error}")
    with ExitStack() as stack:
        stack.callback(_remove, group)
        (group / "cgroup.procs").write_text(str(pid))
        (group / "freezer.state").write_text("FROZEN")
        yield


def _remove(group: Path) -> None:
    (group / "freezer.state").write_text("THAWED")
    while (group / "cgroup.procs").read_text():
        time.sleep(0.01)
    group.rmdir()


def test_process_that_the_kernel_holds_is_named(sleeper: subprocess.Popen[bytes]) -> None:
    began = time.monotonic()
    with (
        frozen(sleeper.pid),
        pytest.raises(ServeError, match=LINE.format(sleeper.pid)),
    ):
        processes.end_descendants(os.getpid(), limit=1)
    assert time.monotonic() - began < 5
    assert sleeper.wait(5) == -9


def test_process_that_takes_no_signal_is_named(
    sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where nothing can be frozen."""
    monkeypatch.setattr(psutil.Process, "kill", lambda process: None)
    with pytest.raises(ServeError, match=LINE.format(sleeper.pid)):
        processes.end_descendants(os.getpid(), limit=1)


def test_process_of_another_user_is_named(sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: psutil.Process) -> None:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "kill", refuse)
    with pytest.raises(ServeError, match=LINE.format(sleeper.pid)):
        processes.end_descendants(os.getpid(), limit=1)


def test_process_whose_memory_is_being_freed_is_waited_for(sleeper: subprocess.Popen[bytes]) -> None:
    assert not processes._is_ending(sleeper.pid)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert processes._is_ending(sleeper.pid)
    sleeper.wait()
    assert processes._is_ending(sleeper.pid)


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[str]]]:
    """Let a function hang, as the reading of a process's memory map may; tells of its calls."""
    over = threading.Event()

    def let_hang(name: str) -> list[str]:
        calls: list[str] = []

        def function(*_: object) -> object:
            calls.append(name)
            over.wait()
            return {} if name == "titled" else set()

        monkeypatch.setattr(processes, name, function)
        return calls

    yield let_hang
    over.set()


@pytest.mark.parametrize("name", ["_segments", "_trackers"])
def test_end_does_not_hang_where_reading_does(
    sleeper: subprocess.Popen[bytes], hang: Callable[[str], list[str]], name: str
) -> None:
    calls = hang(name)
    began = time.monotonic()
    processes.end_descendants(os.getpid())
    assert time.monotonic() - began < 5
    assert calls
    assert not psutil.pid_exists(sleeper.pid)


def test_resource_tracker_gets_its_time_once_all_others_are_gone(tmp_path: Path) -> None:
    """On a busy machine it needs seconds for what nobody else can do."""
    done = tmp_path / "done"
    code = "import pathlib, sys, time; sys.stdin.read(); time.sleep(3); pathlib.Path(sys.argv[1]).touch()"
    tracker = f"{code} # resource_tracker"
    with subprocess.Popen([sys.executable, "-c", tracker, str(done)], stdin=subprocess.PIPE) as process:
        pipe = process.stdin
        assert pipe is not None
        holder = subprocess.Popen(["sleep", "600"], stdout=pipe)
        pipe.close()
        time.sleep(0.5)
        processes.end_descendants(os.getpid())
    assert done.exists()
    holder.wait(5)


def test_survey_that_hangs_is_not_begun_again(hang: Callable[[str], list[str]]) -> None:
    calls = hang("titled")
    survey = processes.Survey(os.getpid(), "VLLM::")
    for _ in range(3):
        survey.go_on()
        time.sleep(0.05)
    assert calls == ["titled"]


def test_survey_finds_titles_and_remembers_them() -> None:
    survey = processes.Survey(os.getpid(), "VLLM::")
    with subprocess.Popen(["VLLM::Test", "600"], executable="/bin/sleep") as process:
        deadline = time.monotonic() + 10
        while not survey.titles and time.monotonic() < deadline:
            survey.go_on()
            time.sleep(0.05)
        process.kill()
    survey.go_on()
    time.sleep(0.2)
    assert survey.titles == {process.pid: "VLLM::Test"}
