"""The memory that the processes of a command share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from expo_serve.state import shared
from expo_serve.state.shared import Reporter, SharedState, report_as


def in_child(code: str, *descriptors: int) -> str:
    """What a child of this process prints."""
    command = [sys.executable, "-c", f"from expo_serve.state.shared import *\n{code}"]
    return subprocess.run(command, pass_fds=descriptors, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


@pytest.fixture
def state() -> Iterator[SharedState]:
    """A new one."""
    state = SharedState.create()
    yield state
    state.close()


def test_each_process_reads_what_the_others_write(state: SharedState) -> None:
    state.reporter("command", alpha="0.5")
    state.engine_timeout = 7.5
    code = "s = SharedState.find(); s.reporter('rank', seen=[s.reports('command')[0]['alpha'], s.engine_timeout])"
    in_child(f"{code}; s.draining = 3.25")
    (report,) = state.reports("rank")
    assert report["seen"] == ["0.5", 7.5]
    assert report["pid"] != os.getpid()
    assert state.draining == 3.25
    assert state.cutting == 0


def test_it_is_found_by_grandchildren_and_by_orphans_that_are_adopted(state: SharedState) -> None:
    state.reporter("command", alpha="1")
    inner = "from expo_serve.state.shared import *; print(len(SharedState.find().reports()))"
    assert in_child(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])") == "1"


def test_nothing_is_found_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_ancestors", lambda: iter([os.getpid(), 0, 2**22 + 1]))
    with Path(os.devnull).open():
        assert SharedState.find() is None
    reporter = report_as("rank", engine=0)
    reporter.update(done=1)
    reporter.fail("load", "of no consequence")


def test_another_memory_of_that_name_is_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_ancestors", lambda: iter([os.getpid()]))
    descriptor = os.memfd_create("expo-serve-state")
    try:
        os.ftruncate(descriptor, 10)
        assert SharedState.find() is None
        os.ftruncate(descriptor, shared._SIZE)
        assert SharedState.find() is None
    finally:
        os.close(descriptor)


def test_what_was_handed_over_comes_first(state: SharedState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_own", None)
    shared.adopt(os.dup(state.descriptor))
    state.reporter("command")
    found = SharedState.find()
    assert found is not None
    assert [report["role"] for report in found.reports()] == ["command"]
    found.close()


def test_processes_take_different_slots(state: SharedState) -> None:
    code = "s = SharedState.find(); [s.reporter('rank', rank=n) for n in range(20)]"
    children = [
        subprocess.Popen([sys.executable, "-c", f"from expo_serve.state.shared import *; {code}"]) for _ in range(4)
    ]
    assert [child.wait() for child in children] == [0] * 4
    reports = state.reports()
    assert len(reports) == 80
    assert {(report["pid"], report["rank"]) for report in reports} == {
        (child.pid, rank) for child in children for rank in range(20)
    }


def test_a_reader_never_sees_half_of_a_write(state: SharedState) -> None:
    reporter = state.reporter("rank", value=[0] * 400)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number = (number + 1) % 10
            reporter.update(value=[number] * 400)

    whole = "{len(set(r['value'])) for _ in range(3000) for r in s.reports()}"
    taken = "{s._length(0) for _ in range(300_000)}"
    code = f"s = SharedState.find(); print({whole}, len({taken}))"
    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert in_child(code) == "{1} 1"
    finally:
        stop.set()
        thread.join()


def test_a_slot_that_was_left_half_written_is_passed_over(state: SharedState) -> None:
    state.reporter("command")
    broken = state.reporter("rank")
    state.reporter("api")
    state._memory[shared._start(1) + 8] ^= 255
    assert [report["role"] for report in state.reports()] == ["command", "api"]
    broken.update(rank=1)
    assert len(state.reports()) == 3


def test_a_slot_that_is_half_written_shows_what_it_held(state: SharedState) -> None:
    """Else a process that lives, and is not on its processor for a moment, would count as gone."""
    keeper = state.reporter("keeper", alive=1.0)
    assert len(state.reports("keeper")) == 1
    state._memory[shared._start(0) + 8] ^= 255
    assert [report["alive"] for report in state.reports("keeper")] == [1.0]
    keeper.update(alive=2.0)
    assert [report["alive"] for report in state.reports("keeper")] == [2.0]


def test_too_much_to_say_costs_the_oldest_warnings(state: SharedState) -> None:
    reporter = state.reporter("command")
    for number in range(50):
        reporter.warn(f"{number}: {'x' * 5000}")
    reporter.fail("pair", "e" * 5000)
    reporter.fail("load", "a later one")
    (report,) = state.reports()
    assert report["warnings"][-1].startswith("49: ")
    assert len(report["error"]["message"]) == 1200
    assert report["error"]["reason"] == "pair"
    reporter.update(value="y" * 5000)
    (report,) = state.reports()
    assert report.keys() == {"role", "pid", "error", "warnings"}
    assert report["warnings"] == []


def test_long_words_of_any_script_cost_nothing_else(state: SharedState) -> None:
    reporter = state.reporter("rank", engine=0, rank=1, began=1.0)
    reporter.fail("load", "模" * 2000 + "\udc80")
    reporter.warn("é" * 2000)
    reporter.update(large="模" * 5000)
    (report,) = state.reports()
    assert report["error"]["message"] == "模" * 400
    assert report.keys() == {"role", "pid", "engine", "rank", "began", "error", "warnings"}


def test_more_processes_than_slots_are_not_shown(state: SharedState) -> None:
    for _ in range(shared._SLOTS):
        state.reporter("rank")
    late = state.reporter("rank", late=True)
    late.update(late=2)
    assert len(state.reports()) == shared._SLOTS
    assert not any("late" in report for report in state.reports())


def test_none_removes_a_field(state: SharedState) -> None:
    reporter = state.reporter("command", a=1)
    reporter.update(a=None, b=2)
    reporter.enter("resolve")
    reporter.enter("start")
    (report,) = state.reports()
    assert json.loads(json.dumps(report)) == report
    assert "a" not in report
    assert list(report["phases"]) == ["resolve", "start"]


def test_without_memory_a_reporter_does_nothing() -> None:
    Reporter(None, None, {}).update(a=1)
