"""What the keeper makes of an end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from expo_serve.cli.keeper import Keeper


@pytest.fixture
def keeper() -> Iterator[Any]:
    """A keeper whose server has served, and has ended with code 0 after SIGTERM."""
    made: Any = Keeper({})
    made._server = SimpleNamespace(poll=lambda: 0, returncode=0)
    made._serving, made.signals = True, [signal.SIGTERM]
    made._stop_under_way = SimpleNamespace(has_terminated=True)
    yield made
    made._state.close()  # else other tests would find it among the open files


def test_signal_after_a_death_hides_no_failure(keeper: Any) -> None:
    assert keeper._verdict() == 0
    keeper._give_up_at, keeper._cause = 1.0, "vLLM's process VLLM::Worker died while serving"
    assert keeper._verdict() == 1
    assert "Worker" in keeper._cause
    keeper._stop_under_way = None
    assert keeper._stop() == 1


@pytest.mark.parametrize("code", [0, 1, -signal.SIGKILL])
def test_server_that_ends_in_the_middle_of_its_drain_has_failed(keeper: Any, code: int) -> None:
    keeper._server.returncode = code
    keeper._stop_under_way.has_terminated = False
    assert keeper._verdict() == 1
    assert keeper._cause


def test_worker_alone_has_no_drain_to_fail_in(keeper: Any) -> None:
    keeper._status, keeper._stop_under_way = {"ranks": 1}, None
    assert keeper._verdict() == 0


@pytest.mark.parametrize(
    ("exception", "shown"),
    [
        ("RuntimeError: cannot parse 'my bank account'", "RuntimeError"),
        ("torch.OutOfMemoryError: 8 GiB", "torch.OutOfMemoryError"),
        ("/data/model.safetensors: is gone", "an error"),  # of ours, without its class
        ("tensor 'a' holds NaN", "an error"),
    ],
)
def test_what_an_exception_says_while_serving_is_not_shown(keeper: Any, exception: str, shown: str) -> None:
    keeper._log = SimpleNamespace(root_cause=lambda: exception, failed_time=0.0)
    keeper._blame("vLLM's engine failed")
    keeper._fail(keeper._reason, keeper._cause)
    assert keeper._cause == exception
    (report,) = keeper._state.reports("keeper")
    assert report["error"]["message"] == f"{shown} (what it says is in the log)"


def test_keeper_that_is_stuck_says_so(keeper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command sees its beat: another thread must not go on with it."""

    class Over(Exception):
        pass

    def stop(_: float) -> None:
        raise Over

    monkeypatch.setattr("expo_serve.cli.keeper.time", SimpleNamespace(monotonic=lambda: 100.0, sleep=stop))
    for signals, moved, beats in (
        ([], 100.0 - 21, False),
        ([], 100.0 - 19, True),
        ([], float("inf"), True),
        ([signal.SIGTERM], 100.0 - 6, False),
        ([signal.SIGTERM], 100.0 - 4, True),
    ):
        keeper.signals, keeper._moved = signals, moved
        keeper._reporter.update(alive=None)
        with pytest.raises(Over):
            keeper._beat()
        (report,) = keeper._state.reports("keeper")
        assert ("alive" in report) is beats


def test_files_that_cannot_be_removed_hold_up_no_end(keeper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr("expo_serve.cli.keeper.shutil.rmtree", lambda *_, **__: never.wait())
    monkeypatch.setattr("expo_serve.cli.keeper.processes.end_descendants", lambda *_: None)
    keeper._folder, began = "/nowhere", time.monotonic()
    assert keeper._end_processes() is None
    assert time.monotonic() - began < 5
    never.set()


def test_machine_without_a_port_serves_when_all_of_its_ranks_have_loaded(keeper: Any) -> None:
    keeper._status = {"ranks": 2}
    reporters = [keeper._state.reporter("rank", engine=0, rank=rank, began=1.0, updated=1.0) for rank in range(2)]
    reporters[0].update(ended=2.0)
    assert not keeper._has_loaded()
    reporters[1].update(ended=3.0)
    assert keeper._has_loaded()
    keeper._status = {"ranks": 3}
    assert not keeper._has_loaded()
