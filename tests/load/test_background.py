"""Writes in threads: the same result as without, errors not lost, nothing looked at too early."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from expo_serve.load import sizes
from expo_serve.load.coverage import WriteTracker
from expo_serve.load.threads import Background
from tests.load.lazies import Lazies


@pytest.fixture
def model() -> torch.nn.Linear:
    return torch.nn.Linear(64, 128)


@pytest.fixture
def background(model: torch.nn.Linear, monkeypatch: pytest.MonkeyPatch) -> Iterator[Background]:
    """With threads, also on a machine of one core."""
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    with Background(model) as entered:
        yield entered


def add(dest: torch.Tensor, number: float, seconds: float = 0.0) -> None:
    time.sleep(seconds)
    dest.mul_(2).add_(number)


def test_overlapping_writes_keep_their_order(model: torch.nn.Linear, background: Background) -> None:
    weight = model.weight.data.fill_(0)
    for number, seconds in ((1, 0.05), (2, 0.0), (3, 0.02), (4, 0.0)):
        background.submit(weight[10:20], lambda n=number, s=seconds: add(weight[10:20], n, s))  # type: ignore[misc]
    background.wait()
    assert torch.equal(weight[10:20], torch.full((10, 64), 26.0))  # (((0*2+1)*2+2)*2+3)*2+4


def test_writes_apart_run_side_by_side(model: torch.nn.Linear, background: Background) -> None:
    met = threading.Barrier(2, timeout=10)

    def meet() -> None:
        met.wait()

    for rows in (slice(0, 10), slice(10, 20)):
        background.submit(model.weight.data[rows], meet)
    background.wait()
    assert not met.broken


def test_an_error_comes_out_of_wait(model: torch.nn.Linear, background: Background) -> None:
    def fail() -> None:
        raise ArithmeticError("not finite")

    background.submit(model.weight.data, fail)
    for _ in range(2):  # whoever swallows it the first time meets it again
        with pytest.raises(ArithmeticError, match="not finite"):
            background.wait()


def test_bytes_handed_over_are_bounded_and_all_done(
    model: torch.nn.Linear, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    row_bytes = model.weight.data[0].nbytes
    monkeypatch.setattr(sizes, "PENDING_BYTES", 7 * row_bytes)
    for row in range(128):
        background.submit(model.weight.data[row], lambda row=row: done.append(row))  # type: ignore[misc]
        assert background._pending_bytes == len(background._pending) * row_bytes <= 7 * row_bytes
    background.wait()
    assert sorted(done) == list(range(128))


def test_other_tensors_and_other_times_run_at_once(model: torch.nn.Linear, background: Background) -> None:
    here = threading.get_ident()
    ran: list[int] = []
    background.submit(torch.empty(3), lambda: ran.append(threading.get_ident()))
    Background(model).submit(model.weight.data, lambda: ran.append(threading.get_ident()))
    assert ran == [here, here]


def test_an_operation_that_looks_waits(model: torch.nn.Linear, background: Background) -> None:
    weight = model.weight.data.fill_(0)
    with WriteTracker(model, background.wait_for):
        background.submit(weight, lambda: add(weight, 7, 0.1))
        assert weight.view(-1)[5].item() == 7


def test_an_operation_on_other_memory_goes_on(model: torch.nn.Linear, background: Background) -> None:
    """Models ask their own tensors on the way, which expert is where for one: that must not stop the threads."""
    weight, asked = model.weight.data.fill_(0), torch.arange(4)
    may_go_on = threading.Event()

    def write() -> None:
        assert may_go_on.wait(10)
        add(weight, 7, 0.0)

    with WriteTracker(model, background.wait_for):
        background.submit(weight, write)
        assert asked[2].item() == 2
        other = torch.stack([asked, asked])
        assert not may_go_on.is_set()
        may_go_on.set()
        assert [*torch.unbind(weight.view(-1))][5].item() == 7
    assert other.shape == (2, 4)


def test_a_model_loaded_in_the_background_has_the_same_bits(
    model: torch.nn.Linear, background: Background, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    base, aligned = torch.randn(128, 64), torch.randn(128, 64)
    case = Lazies(tmp_path).make(base, aligned, 0.7, background.submit)
    with WriteTracker(model, background.wait_for) as tracker:
        for start in range(0, 128, 32):
            model.weight.data[start : start + 32].copy_(case.lazy[start : start + 32])
        model.bias.data.fill_(0)
        background.wait()
    assert torch.equal(model.weight, torch.lerp(base, aligned, 1.7))
    assert tracker.unwritten() == {}
