"""The command's processes from their start to their end, with a server that is ready at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from expo_serve.cli import family
from expo_serve.errors import ServeError
from tests.server import free_port
from tests.vllm_plugin.trees import assert_all_gone

ROOT = Path(__file__).parents[2]
MAX_BYTES = 80 << 20
SECONDS = 30


BLIND = """
import sys, threading
if "expo_serve.cli.keeper" in sys.orig_argv:
    def go_blind():
        import psutil
        def refuse(*_, **__):
            raise OSError(24, "Too many open files")
        psutil.Process.children = refuse
    threading.Timer(2, go_blind).start()
"""


class Command:
    """A running command and its status port."""

    def __init__(self, engine_timeout: float = 0.0, **request: Any) -> None:
        self.status_port = free_port()
        given = {
            "request": {"port": free_port(), **request},
            "status_port": self.status_port,
            "engine_timeout": engine_timeout,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.family_command", json.dumps(given)],
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
        )
        self.family: list[psutil.Process] = []

    def state(self) -> dict[str, Any]:
        """What the status port shows."""
        answer: dict[str, Any] = httpx.get(f"http://127.0.0.1:{self.status_port}/state", timeout=5).json()
        return answer

    def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for a state."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            try:
                if condition(state := self.state()):
                    return state
            except httpx.TransportError:
                assert self.process.poll() is None
            time.sleep(0.05)
        raise AssertionError("that state never came")

    def wait_ready(self) -> Command:
        """Wait until it serves; its processes are then known."""
        self.wait_for(lambda state: bool(state["ready"]))
        root = psutil.Process(self.process.pid)
        self.family = [root, *root.children(recursive=True)]
        return self

    def part(self, name: str) -> psutil.Process:
        """The process that runs a module."""
        return next(process for process in self.family if name in " ".join(process.cmdline()))

    def end(self) -> tuple[int, list[str]]:
        """Wait for the end; returns the exit code and the lines of standard error."""
        assert self.process.stderr is not None
        output = self.process.stderr.read()
        code = self.process.wait(SECONDS)
        assert_all_gone(self.family)
        return code, output.splitlines()


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Command]]:
    """Starts commands, and ends what is left of them; nothing may stay in the folder of temporary files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    commands: list[Command] = []

    def begin(*arguments: Any, **request: Any) -> Command:
        commands.append(Command(*arguments, **request))
        return commands[-1]

    yield begin
    for command in commands:
        with command.process as process:
            process.kill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_clean_stop_is_0_and_ends_with_the_last_request(start: Callable[..., Command], number: int) -> None:
    command = start(open=[0.5, 1.5], drain_seconds=30).wait_ready()
    assert command.state()["requests"] == {"open": 2, "cut": 0}
    command.process.send_signal(number)
    began = time.monotonic()
    state = command.wait_for(lambda state: state["phase"] == "draining")
    assert state["reason"] == "the server is draining"
    assert httpx.get(f"http://127.0.0.1:{command.status_port}/live").status_code == 200
    assert command.end() == (0, [])
    assert 1.4 < time.monotonic() - began < 8


def test_requests_that_stay_open_are_cut_and_counted(start: Callable[..., Command]) -> None:
    command = start(open=[60, 60, 0.2], drain_seconds=1).wait_ready()
    command.process.terminate()
    code, lines = command.end()
    assert code == 0
    assert lines == ["expo-serve: warning: 2 requests were cut: still open 1 s after the signal (--shutdown-timeout)"]


def test_server_that_dies_in_the_middle_of_its_drain_is_1(start: Callable[..., Command]) -> None:
    command = start(open=[60], drain_seconds=60).wait_ready()
    command.process.terminate()
    command.wait_for(lambda state: state["phase"] == "draining")
    command.part("tests.cli.drain_server").kill()
    code, lines = command.end()
    assert code == 1
    assert lines[-1] == "expo-serve: error: vLLM's server was killed by SIGKILL while serving"


def test_second_signal_ends_it_at_once(start: Callable[..., Command]) -> None:
    command = start(open=[60], drain_seconds=60).wait_ready()
    command.process.terminate()
    command.wait_for(lambda state: state["phase"] == "draining")
    command.process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert command.end() == (128 + signal.SIGINT, [])
    assert time.monotonic() - began < 8


def test_server_that_had_to_be_killed_is_1(start: Callable[..., Command]) -> None:
    command = start(deaf=True).wait_ready()
    command.process.terminate()
    code, lines = command.end()
    assert code == 1
    assert re.fullmatch(r"expo-serve: error: vLLM did not end within \d+ s of the signal and was killed", lines[-1])


@pytest.mark.parametrize("name", ["expo_serve.cli.keeper", "tests.cli.drain_server"])
def test_stopped_process_of_the_family_ends_it(start: Callable[..., Command], name: str) -> None:
    """Whoever hangs: the command ends in a bounded time after a signal, and says why."""
    command = start(open=[60], drain_seconds=1).wait_ready()
    command.part(name).suspend()
    command.process.terminate()
    code, lines = command.end()
    assert code == 1
    assert lines[-1].startswith("expo-serve: error: ")


def test_hung_engine(start: Callable[..., Command]) -> None:
    command = start(1.0, answers=False).wait_ready()
    state = command.wait_for(lambda state: bool(state["engine"]["is_hung"]))
    assert not state["ready"]
    code, lines = command.end()
    assert code == 1
    assert any("not ready; it is ended after 2 s" in line for line in lines)
    assert re.search(r"has not answered for [\d]+ s: vLLM's API server \(process \d+\) hung", lines[-1])


def test_all_frozen_for_a_while_is_no_hang(start: Callable[..., Command]) -> None:
    """As by `docker pause`: time goes on, and nobody could answer."""
    command = start(3.0).wait_ready()
    for process in command.family:
        process.suspend()
    time.sleep(8)
    for process in command.family:  # the server, which has to answer, last
        process.resume()
        time.sleep(0.3)
    command.wait_for(lambda state: bool(state["ready"]))
    command.process.terminate()
    assert command.end() == (0, [])


def test_keeper_that_cannot_see_its_processes(
    start: Callable[..., Command], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No descriptor is free, for example: the server serves on, and the command ends what the keeper cannot."""
    place = tmp_path_factory.mktemp("site")
    (place / "sitecustomize.py").write_text(BLIND)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", f"{place}:{ROOT}")
    command = start().wait_ready()
    command.wait_for(lambda state: state["uptime_seconds"] > 6)
    assert command.state()["ready"]
    command.process.terminate()
    code, lines = command.end()
    assert code == 1
    assert "may be left behind: OSError" in lines[-1]


@pytest.mark.parametrize("name", ["expo_serve.cli.keeper", "tests.cli.drain_server"])
def test_killed_process_of_the_family_ends_it(start: Callable[..., Command], name: str) -> None:
    command = start().wait_ready()
    command.part(name).kill()
    code, lines = command.end()
    assert code == 1
    assert "SIGKILL" in lines[-1]


def test_killed_command_takes_all_with_it(start: Callable[..., Command]) -> None:
    command = start().wait_ready()
    command.process.kill()
    command.process.wait()
    assert_all_gone(command.family, within=15)


def test_killed_status_process_comes_back(start: Callable[..., Command]) -> None:
    command = start().wait_ready()
    command.part("expo_serve.state.server").kill()
    time.sleep(0.1)
    assert command.wait_for(lambda state: bool(state["ready"]))["phase"] == "serving"
    root = psutil.Process(command.process.pid)
    command.family = [root, *root.children(recursive=True)]
    command.process.terminate()
    assert command.end() == (0, [])


def test_failed_start_stays_until_it_was_scraped(start: Callable[..., Command]) -> None:
    command = start(port=-1)  # no port: the server fails
    state = command.wait_for(lambda state: state["phase"] == "failed")
    assert "OverflowError" in state["error"]["message"]
    assert command.process.poll() is None
    metrics = httpx.get(f"http://127.0.0.1:{command.status_port}/metrics").text
    assert 'expo_state_failed{message="OverflowError' in metrics
    began = time.monotonic()
    assert command.end()[0] == 1
    assert time.monotonic() - began < 5


def test_signal_ends_a_failed_start(start: Callable[..., Command]) -> None:
    command = start(port=-1)
    command.wait_for(lambda state: state["phase"] == "failed")
    began = time.monotonic()
    command.process.terminate()
    assert command.end()[0] == 1
    assert time.monotonic() - began < 5


def test_process_1_reaps_what_is_not_its_own(tmp_path: Path) -> None:
    """As in a container, where whatever loses its parent becomes a child of the command."""
    namespace = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to make a namespace of process ids")
    request = {"request": {"port": free_port()}}
    command = subprocess.Popen(
        [*namespace, sys.executable, "-m", "tests.cli.family_command", json.dumps(request)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )
    try:
        deadline = time.monotonic() + SECONDS
        while len(psutil.Process(command.pid).children(recursive=True)) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (first,) = psutil.Process(command.pid).children()
        enter = ["nsenter", "--target", str(first.pid), "--pid", "--mount"]
        subprocess.run([*enter, "sh", "-c", "sleep 2 & sleep 2 &"], check=True)
        while [child.name() for child in first.children()].count("sleep") < 2:  # at first they are shells
            assert time.monotonic() < deadline, first.children()
            time.sleep(0.05)
        while any(child.name() == "sleep" for child in first.children()):
            assert time.monotonic() < deadline, first.children()
            time.sleep(0.1)
    finally:
        command.kill()
        command.wait()


def test_folder_that_cannot_be_removed_holds_up_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr("expo_serve.cli.family.shutil.rmtree", lambda *_, **__: never.wait())
    began = time.monotonic()
    with family.Family(began, 0.0, None) as made:
        made._folder = "/nowhere"
    assert time.monotonic() - began < 5
    never.set()


def test_no_folder_for_sockets_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/no/such/folder")
    with pytest.raises(
        ServeError, match=r"none can be made: No such file or directory \(/proc/no/such/folder/expo-.*\); set TMPDIR"
    ):
        family._make_folder()


@pytest.mark.parametrize("length", [30, 200])
def test_folder_for_sockets_has_room_for_their_names(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as top:
        folder = Path(top) / ("x" * length)
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        made = family._make_folder()
        assert [str(path) for path in folder.iterdir()] == ([made] if length == 30 else [])
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{made}/{uuid.uuid4()}")
        shutil.rmtree(made)


def test_all_three_take_little_memory(start: Callable[..., Command]) -> None:
    command = start().wait_ready()
    mine = [process for process in command.family if "drain_server" not in " ".join(process.cmdline())]
    assert len(mine) == 3
    assert sum(process.memory_full_info().pss for process in mine) < MAX_BYTES
    command.process.terminate()
    assert command.end() == (0, [])
