"""What the keeper makes of an end."""

from __future__ import annotations

import signal
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
    yield made
    made._state.close()  # else other tests would find it among the open files


def test_signal_after_a_death_hides_no_failure(keeper: Any) -> None:
    assert keeper._verdict() == 0
    keeper._give_up_at, keeper._cause = 1.0, "vLLM's process VLLM::Worker died while serving"
    assert keeper._verdict() == 1
    assert "Worker" in keeper._cause
    assert keeper._stop() == 1


def test_machine_without_a_port_serves_when_all_of_its_ranks_have_loaded(keeper: Any) -> None:
    keeper._status = {"ranks": 2}
    reporters = [keeper._state.reporter("rank", engine=0, rank=rank, began=1.0, updated=1.0) for rank in range(2)]
    reporters[0].update(ended=2.0)
    assert not keeper._has_loaded()
    reporters[1].update(ended=3.0)
    assert keeper._has_loaded()
    keeper._status = {"ranks": 3}
    assert not keeper._has_loaded()
