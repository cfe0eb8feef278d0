"""The way onto a device, with a stand-in that does its work as late as a device may do it."""

from __future__ import annotations

import errno
import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expo_serve.config import Method
from expo_serve.errors import CheckpointError, ValuesError
from expo_serve.load.counts import Counts
from expo_serve.load.device import Mark, Stage, Stages
from expo_serve.load.lazy import LazyTensor, lazy_tensor
from expo_serve.load.reader import Reader
from expo_serve.load.session import LoadSession
from expo_serve.load.sizes import MAX_DEVICE_SHARE as MAX_SHARE
from expo_serve.load.sizes import STAGE_TURNS as TURNS
from tests.faults import before_reads, fail_from
from tests.load.lazies import NAME, Lazies, numbers
from tests.models.raw import same_bits
from tests.models.reference import extrapolate


class LaggingQueue:
    """A device's queue on the CPU. Work waits until somebody waits for it, or until chance lets some of it be done, as
    a device would: whoever fills a buffer too early is found out by wrong bits."""

    def __init__(self, seed: int | None = None, total: int = 1 << 40) -> None:
        self.allocated = 0
        self.calls: list[str] = []
        self._total = total
        self._chance = random.Random(seed) if seed is not None else None
        self._todo: deque[Callable[[], None]] = deque()
        self._given = self._done = 0

    def host_memory(self, size: int) -> torch.Tensor:
        return torch.full((size,), 0x7F, dtype=torch.uint8)

    def device_memory(self, size: int) -> torch.Tensor:
        self.allocated += size
        return self.host_memory(size)

    def total_memory(self) -> int:
        return self._total

    def begin(self, dest: torch.Tensor) -> None:
        self.calls.append("begin")

    def run(self, work: Callable[[], None]) -> None:
        self.calls.append("run")
        self._todo.append(work)
        self._given += 1
        if self._chance:
            self._do_until(self._done + self._chance.randrange(len(self._todo) + 1))

    def mark(self) -> Mark:
        return _LaggingMark(self, self._given)

    def finish(self) -> None:
        self.calls.append("finish")

    def _do_until(self, number: int) -> None:
        while self._done < number:
            self._todo.popleft()()
            self._done += 1


class _LaggingMark:
    def __init__(self, queue: LaggingQueue, number: int) -> None:
        self._queue, self._number = queue, number

    def wait(self) -> None:
        self._queue._do_until(self._number)


class OneStage(Stages):
    """Takes every copy that way, also those to the CPU."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def onto(self, device: torch.device) -> Stage:
        return self.stage

    def wait(self) -> None:
        self.stage.wait()


@pytest.fixture(autouse=True)
def closed_stages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the threads of every stage end with its test."""
    made: list[Stage] = []
    initialise = Stage.__init__

    def remember(stage: Stage, *arguments: Any, **options: Any) -> None:
        initialise(stage, *arguments, **options)
        made.append(stage)

    monkeypatch.setattr(Stage, "__init__", remember)
    yield
    for stage in made:
        stage.close()


@pytest.fixture(scope="module")
def lazies(tmp_path_factory: pytest.TempPathFactory) -> Lazies:
    return Lazies(tmp_path_factory.mktemp("staging"))


def staged(
    lazies: Lazies, base: torch.Tensor, aligned: torch.Tensor, alpha: float, stage: Stage, rounding: Method = "nearest"
) -> LazyTensor:
    plan = lazies.plan({NAME: base}, {NAME: aligned}, alpha, rounding)
    return lazy_tensor(plan.tensors[NAME], LoadSession(Reader(), Counts(), stages=OneStage(stage)))


def copied(lazy: torch.Tensor, stage: Stage, dtype: torch.dtype | None = None) -> torch.Tensor:
    dest = torch.full(lazy.shape, 7, dtype=dtype or lazy.dtype)
    dest.copy_(lazy)
    stage.wait()
    return dest


DTYPES = [torch.bfloat16, torch.float16, torch.float32]
VIEWS: list[Callable[[Any], Any]] = [
    lambda t: t,
    lambda t: t.t(),
    lambda t: t[1:, 2:5],
    lambda t: t[:, ::2],
    lambda t: t.view(-1)[3:],
    lambda t: t[None].expand(3, *t.shape),
]


@settings(deadline=None, max_examples=150)
@given(
    shape=st.tuples(st.integers(2, 40), st.integers(6, 40)),
    grown=st.integers(0, 5),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    dest=st.sampled_from([None, *DTYPES]),
    alpha=st.sampled_from([-1, 0, 0.5, 1.7]),
    stage_bytes=st.integers(8, 4000),
    turns=st.integers(1, 4),
    seed=st.one_of(st.none(), st.integers(0, 99)),
    view=st.sampled_from(VIEWS),
    rounding=st.sampled_from(["nearest", "dithered"]),
)
def test_bits_do_not_depend_on_pieces_turns_or_lateness(
    lazies: Lazies,
    shape: tuple[int, int],
    grown: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    dest: torch.dtype | None,
    alpha: float,
    stage_bytes: int,
    turns: int,
    seed: int | None,
    view: Callable[[Any], Any],
    rounding: Method,
) -> None:
    rows, columns = shape
    base = numbers(rows, columns, dtype=dtypes[0])
    aligned = numbers(rows + grown, columns, seed=1, dtype=dtypes[1])
    stage = Stage(LaggingQueue(seed), stage_bytes, turns, threads=2)
    lazy = staged(lazies, base, aligned, alpha, stage, rounding)
    expected = view(extrapolate(base, aligned, alpha, NAME if rounding == "dithered" else None))
    assert same_bits(copied(view(lazy), stage, dest), expected.to(dest or expected.dtype))
    stage.close()


def test_a_buffer_that_is_filled_too_early_would_be_seen(lazies: Lazies, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in is late enough: without waiting for the marks the result is wrong."""
    monkeypatch.setattr(Stage, "_settle", lambda self, turn: None)
    queue = LaggingQueue()
    stage = Stage(queue, 64)
    base, aligned = numbers(50, 8), numbers(50, 8, seed=1)
    dest = torch.empty(50, 8, dtype=torch.bfloat16)
    dest.copy_(staged(lazies, base, aligned, 0.5, stage))
    queue.mark().wait()
    assert not torch.equal(dest, extrapolate(base, aligned, 0.5))


def test_the_models_stream_is_waited_for_and_waits(lazies: Lazies) -> None:
    queue = LaggingQueue()
    stage = Stage(queue, 64)
    copied(staged(lazies, numbers(12, 8), numbers(12, 8, seed=1), 0.5, stage), stage)
    assert queue.calls == ["begin", "run", "run", "run", "finish"]


@pytest.mark.parametrize(("total", "piece"), [(1 << 40, 8 << 20), (1 << 30, 4 << 20), (64 << 20, 1 << 18)])
def test_device_memory_is_bounded_by_the_buffers(total: int, piece: int) -> None:
    queue = LaggingQueue(total=total)
    stage = Stage(queue)
    assert stage.piece_bytes == piece
    assert queue.allocated == 2 * TURNS * piece <= min(512 << 20, total // MAX_SHARE)


@pytest.mark.parametrize(("side", "alpha"), [("base", 0.5), ("aligned", 0.5), ("aligned", 0), ("base", -1)])
@pytest.mark.parametrize("row", [0, 30, 49])
def test_value_that_is_not_finite_names_tensor_and_file(lazies: Lazies, side: str, alpha: float, row: int) -> None:
    operands = {"base": numbers(50, 8), "aligned": numbers(50, 8, seed=1)}
    operands[side][row, 3] = torch.inf
    stage = Stage(LaggingQueue(), 64)
    lazy = staged(lazies, operands["base"], operands["aligned"], alpha, stage)
    for _ in range(2):  # whoever swallows it the first time meets it again
        with pytest.raises(ValuesError, match=rf"'{NAME}' in .*/{side}/model.safetensors holds NaN"):
            copied(lazy, stage)


def test_result_that_is_too_large_says_so(lazies: Lazies) -> None:
    stage = Stage(LaggingQueue())
    lazy = staged(lazies, torch.full((2, 2), -6e4).half(), torch.full((2, 2), 6e4).half(), 2, stage)
    with pytest.raises(ValuesError, match="alpha 2 it is too large for its dtype"):
        copied(lazy, stage)


def test_finite_values_with_an_infinite_sum_are_no_alarm(lazies: Lazies) -> None:
    values = torch.full((4, 8), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    stage = Stage(LaggingQueue())
    assert same_bits(copied(staged(lazies, values, values.clone(), 0.5, stage), stage), values)


def test_a_mask_may_be_infinite_and_integers_are_copied(lazies: Lazies) -> None:
    tensors = {"h.attn.masked_bias": torch.tensor([-torch.inf]), "ids": torch.arange(40)}
    plan, stage = lazies.plan(tensors, tensors), Stage(LaggingQueue(), 64)
    for name, expected in tensors.items():
        lazy = lazy_tensor(plan.tensors[name], LoadSession(Reader(), Counts(), stages=OneStage(stage)))
        assert same_bits(copied(lazy, stage), expected)


def test_storage_that_fails_ends_it_with_the_cause(lazies: Lazies, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(LaggingQueue(), 64)
    lazy = staged(lazies, numbers(50, 8), numbers(50, 8, seed=1), 0.5, stage)
    before_reads(monkeypatch, fail_from(8, OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(CheckpointError, match=f"'{NAME}' cannot be read: Input/output error"):
        copied(lazy, stage)


def test_devices_without_a_queue_of_their_own_are_copied_to(tmp_path: Path) -> None:
    with Stages() as stages:
        assert stages.onto(torch.device("cpu")) is None
        case = Lazies(tmp_path).make(numbers(6, 8), numbers(6, 8, seed=1))
        lazy = lazy_tensor(case.lazy._pending.planned, LoadSession(Reader(), Counts(), stages=stages))
        assert same_bits(torch.empty(6, 8, dtype=torch.bfloat16).copy_(lazy), case.expected)
        stages.wait()


def test_nothing_is_staged_after_the_load() -> None:
    """Layers that vLLM quantises late copy then, and nobody would wait for a stream."""
    with Stages() as stages:
        pass
    assert stages.onto(torch.device("cuda", 0)) is None
