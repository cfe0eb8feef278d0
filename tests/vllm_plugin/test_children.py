"""How children end is told, whoever else waits for them, and nobody who does misses anything."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

import psutil
import pytest

from expo_serve.vllm_plugin import children
from expo_serve.vllm_plugin.children import ChildEnd, ChildWatch

METHODS = ("fork", "spawn", "forkserver")
SECONDS = 30


@pytest.fixture(scope="module", autouse=True)
def helpers_ended() -> Iterator[None]:
    """The helper processes of multiprocessing end with these tests: others look at all children of this process."""
    yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="exit statuses are Linux's"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]


def end(code: int) -> None:
    """In a child: end with a code, or by a signal where it is negative."""
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


def wait_and_end(code: int) -> None:
    """In a child: live for a moment."""
    time.sleep(0.05)
    end(code)


def have_a_child(pipe: Any, code: int) -> None:
    """In a child: start one that lives on and inherits all that is open, then end."""
    child = os.fork()
    if child == 0:
        time.sleep(SECONDS)
        os._exit(0)
    pipe.send(child)
    end(code)


def take_title(pipe: Any) -> None:
    """In a child: do as vLLM's workers, which give themselves two titles."""
    import setproctitle

    for title in ("VLLM::Worker", "VLLM::Worker_TP1"):
        setproctitle.setproctitle(title)
        pipe.send(title)
        pipe.recv()
    end(-signal.SIGKILL)


@contextmanager
def started(method: str, target: Callable[..., None], *arguments: Any, name: str = "Child") -> Iterator[BaseProcess]:
    """A child process."""
    child = multiprocessing.get_context(method).Process(target=target, args=arguments, name=name)  # type: ignore[attr-defined]
    child.start()
    yield child
    child.kill()
    child.join()


class Watch:
    """A watch that is looked through by hand; knows what was told."""

    def __init__(self) -> None:
        self.told: list[ChildEnd] = []
        self._watch = ChildWatch(self.told.append)

    def look(self, seconds: float = 0.0) -> None:
        """Look once."""
        self._watch.look(seconds)

    def wait(self, pid: int | None) -> ChildEnd:
        """Look until a child's end is told."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            self.look(0.2)
            if found := [ended for ended in self.told if ended.pid == pid]:
                assert len(found) == 1
                return found[0]
        raise AssertionError("its end was never told")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("code", [0, 3, -signal.SIGKILL, -signal.SIGTERM])
def test_end_is_told_and_left_to_the_parent(monkeypatch: pytest.MonkeyPatch, method: str, code: int) -> None:
    monkeypatch.setattr(children, "_PATIENCE_SECONDS", 0.1)  # nobody but this test would wait
    watch = Watch()
    with started(method, end, code, name="EngineCore") as child:
        assert watch.wait(child.pid) == ChildEnd("EngineCore", child.pid or 0, code)
        child.join(SECONDS)
        assert child.exitcode == code


@pytest.mark.parametrize("method", METHODS)
def test_end_that_the_parent_has_seen_first_is_told(method: str) -> None:
    watch = Watch()
    with started(method, end, 7) as child:
        watch.look()
        child.join(SECONDS)
        assert child.exitcode == 7
        assert watch.wait(child.pid).exitcode == 7


def test_end_before_the_first_look_is_told() -> None:
    watch = Watch()
    with started("fork", end, 7) as child:
        while child.exitcode is None:  # this reaps it, and leaves it among the children
            time.sleep(0.01)
        assert watch.wait(child.pid).exitcode == 7
        watch.look()
        assert len([ended for ended in watch.told if ended.pid == child.pid]) == 1


def test_end_of_a_child_that_was_closed_is_told() -> None:
    watch = Watch()
    child = multiprocessing.get_context("fork").Process(target=end, args=(5,))
    child.start()
    pid = child.pid
    watch.look()
    child.join()
    child.close()
    assert watch.wait(pid).exitcode == 5


def test_parent_that_waits_at_the_same_time_misses_nothing() -> None:
    """As vLLM's monitors do."""
    watch, seen = Watch(), []
    for number in range(30):
        with started("fork", wait_and_end, number) as child:
            watch.look()

            def monitor(child: BaseProcess = child) -> None:
                child.join()
                seen.append(child.exitcode)

            thread = threading.Thread(target=monitor)
            thread.start()
            assert watch.wait(child.pid).exitcode == number
            thread.join()
    assert seen == list(range(30))


@pytest.mark.parametrize("code", [3, -signal.SIGKILL])
def test_end_is_told_at_once_though_its_own_children_live(code: int) -> None:
    """They hold its sentinel open, so multiprocessing itself would wait for them."""
    watch = Watch()
    ours, theirs = multiprocessing.Pipe()
    with started("fork", have_a_child, theirs, code) as child:
        grandchild = ours.recv()
        began = time.monotonic()
        assert watch.wait(child.pid).exitcode == code
        assert time.monotonic() - began < SECONDS / 2
        assert psutil.pid_exists(grandchild)
        assert connection.wait([child.sentinel], 0) == []
        os.kill(grandchild, signal.SIGKILL)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_name_is_the_title(method: str) -> None:
    pytest.importorskip("setproctitle")
    watch = Watch()
    ours, theirs = multiprocessing.Pipe()
    with started(method, take_title, theirs, name="VllmWorker-1") as child:
        for _ in range(2):
            ours.recv()
            watch.look()
            ours.send(None)
        assert watch.wait(child.pid) == ChildEnd("VLLM::Worker_TP1", child.pid or 0, -signal.SIGKILL)


def take_title_and_end(pipe: Any, title: str) -> None:
    """In a child: end as soon as there is a title."""
    import setproctitle

    pipe.recv()
    setproctitle.setproctitle(title)
    end(-signal.SIGKILL)


@pytest.mark.parametrize(
    ("name", "title", "told"),
    [
        ("EngineCore", "VLLM::EngineCore", "VLLM::EngineCore"),  # of which the kernel keeps 15 bytes
        ("VllmWorker-0", "VLLM::Worker", "VLLM::Worker"),
        ("EngineCore", "another", "EngineCore"),
    ],
)
def test_title_of_a_moment_ago_is_told(name: str, title: str, told: str) -> None:
    pytest.importorskip("setproctitle")
    watch = Watch()
    ours, theirs = multiprocessing.Pipe()
    with started("fork", take_title_and_end, theirs, title, name=name) as child:
        watch.look()
        ours.send(None)
        deadline = time.monotonic() + SECONDS
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert watch.wait(child.pid).name == told


COMMAND = """
import json, multiprocessing, os, signal, threading
from expo_serve.vllm_plugin.children import watch_children

told = threading.Event()

def tell(ended):
    print(json.dumps([os.getpid(), *ended]), flush=True)
    told.set()

def watch_one(target, name):
    watch_children(tell)
    child = multiprocessing.get_context("fork").Process(target=target, name=name)
    child.start()
    assert told.wait(50)
    child.join()
    return child.exitcode

def core():
    assert watch_one(lambda: os.kill(os.getpid(), signal.SIGKILL), "Worker") == -9
    os._exit(4)

for _ in range(3):
    watch_children(tell)
count = sum(thread.name == "expo-serve-children" for thread in threading.enumerate())
assert watch_one(core, "EngineCore") == 4
print(json.dumps([os.getpid(), count]))
"""


def test_each_process_of_a_tree_tells_of_its_own_children() -> None:
    """The engine core is forked with the watch's mark in memory but without its thread."""
    result = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    *told, (server, count) = [json.loads(line) for line in result.stdout.splitlines()]
    assert count == 1
    (core, worker_name, _, worker_code), (_, core_name, core_pid, core_code) = told
    assert (worker_name, worker_code) == ("Worker", -signal.SIGKILL)
    assert (core_name, core_pid, core_code) == ("EngineCore", core, 4)
    assert core != server


FORKED = """
import multiprocessing, os, threading, time
from expo_serve.state.shared import SharedState, adopt
from expo_serve.vllm_plugin.child_ends import report_child_ends

state = SharedState.create()
adopt(state.descriptor)
context = multiprocessing.get_context("fork")

def core():
    assert sum(thread.name == "expo-serve-children" for thread in threading.enumerate()) == 1
    report_child_ends()
    worker = context.Process(target=lambda: (time.sleep(2), os.abort()))
    worker.start()
    worker.join()
    while not any(pid == worker.pid for report in state.reports("parent") for pid, *_ in report["ended"]):
        time.sleep(0.05)
    assert [report["pid"] for report in state.reports("parent")] == [os.getpid()]

report_child_ends()
report_child_ends()
child = context.Process(target=core)
child.start()
child.join(50)
assert child.exitcode == 0, child.exitcode
"""


def test_forked_process_reports_its_own_children() -> None:
    """It inherits that its parent reports, but not the thread; and vLLM loads no plugin again there."""
    result = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


def test_watch_costs_next_to_nothing() -> None:
    """A thousand looks, which are eight minutes, with a child to watch."""
    watch = Watch()
    with started("fork", time.sleep, 60):
        watch.look()
        began = time.thread_time()
        for _ in range(1000):
            watch.look(0)
        assert time.thread_time() - began < 1


def test_watch_leaves_no_descriptor_open() -> None:
    watch = Watch()
    with started("fork", end, 0) as child:
        watch.wait(child.pid)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with started("fork", end, 0) as child:
            watch.wait(child.pid)
        child.close()
    assert len(os.listdir("/proc/self/fd")) <= before
