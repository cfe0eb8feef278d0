"""Reading, combining and writing in threads: the same bits whatever the pieces, and faults that end the load."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expo_serve import kernels
from expo_serve.config import Method
from expo_serve.errors import CheckpointError, LoadError, ValuesError
from expo_serve.load import sizes, ways
from expo_serve.load import threads as threads_module
from expo_serve.load.counts import Counts
from expo_serve.load.dtypes import meta_tensor
from expo_serve.load.lazy import LazyTensor, lazy_tensor
from expo_serve.load.reader import Reader
from expo_serve.load.selection import FileSpan
from expo_serve.load.session import LoadSession, ModelSession, load_into
from expo_serve.plan.plan import Plan
from tests.faults import Read, before_reads, fail_from
from tests.load.lazies import Lazies, numbers
from tests.models.raw import same_bits
from tests.models.reference import extrapolate

SHAPES = st.lists(
    st.one_of(
        st.just((1,)),
        st.just((0, 5)),
        st.tuples(st.integers(1, 300)),
        st.tuples(st.integers(1, 70), st.integers(1, 70)),
        st.tuples(st.integers(1, 4), st.integers(1, 30), st.integers(1, 30)),
    ),
    min_size=1,
    max_size=12,
)
DTYPES = [torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def threads_take_turns_often() -> Iterator[None]:
    """Python changes threads a thousand times as often as it would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module")
def lazies(tmp_path_factory: pytest.TempPathFactory) -> Lazies:
    return Lazies(tmp_path_factory.mktemp("pipeline"))


class Parameters(torch.nn.Module):
    """Empty parameters of a plan's shapes, under its names with dashes for dots."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.filled: dict[str, torch.Tensor] = {}
        for name, planned in plan.tensors.items():
            values = torch.full_like(meta_tensor(planned.aligned), 7, device="cpu")
            self.register_parameter(name.replace(".", "-"), torch.nn.Parameter(values, requires_grad=False))
            self.filled[name] = values


@settings(deadline=None, max_examples=80)
@given(
    shapes=SHAPES,
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=2),
    alpha=st.sampled_from([-1, 0, 0.5, 1.7]),
    piece_bytes=st.integers(8, 3000),
    block_bytes=st.integers(8, 9000),
    pending_bytes=st.integers(1, 20000),
    threads=st.integers(2, 6),
    cold=st.integers(-1, 2),
    shards=st.integers(1, 3),
    rounding=st.sampled_from(["nearest", "dithered"]),
)
def test_bits_do_not_depend_on_pieces_blocks_or_threads(
    lazies: Lazies,
    shapes: list[tuple[int, ...]],
    dtypes: list[torch.dtype],
    alpha: float,
    piece_bytes: int,
    block_bytes: int,
    pending_bytes: int,
    threads: int,
    cold: int,
    shards: int,
    rounding: Method,
) -> None:
    base = {f"{index}.weight": numbers(*shape, seed=index, dtype=dtypes[0]) for index, shape in enumerate(shapes)}
    aligned = {name: (tensor.float() * 1.03).to(dtypes[1]) for name, tensor in base.items()}
    plan = lazies.plan(base, aligned, alpha, rounding)
    model = Parameters(plan)
    tied = torch.nn.Parameter(torch.full_like(aligned["0.weight"], 7), requires_grad=False)
    model.register_parameter("tied", tied)
    with pytest.MonkeyPatch.context() as patch, load_into(model, threads) as session:
        patch.setattr(sizes, "PIECE_BYTES", piece_bytes)
        patch.setattr(sizes, "BLOCK_BYTES", block_bytes)
        patch.setattr(sizes, "STREAM_PIECE_BYTES", piece_bytes - piece_bytes % 2)
        patch.setattr(sizes, "MAPPED_PIECE_BYTES", piece_bytes - piece_bytes % 2)
        patch.setattr(sizes, "JOINED_BYTES", block_bytes // 2)
        patch.setattr(ways, "LEAST_BYTES", 1)
        patch.setattr(FileSpan, "is_cached", lambda part: part.offset % 3 > cold)
        patch.setattr(sizes, "PENDING_BYTES", pending_bytes)
        loaded = {name: lazy_tensor(tensor, session) for name, tensor in plan.tensors.items()}
        for name, dest in model.filled.items():
            for part, chunk in zip(_shards(dest, shards), _shards(loaded[name], shards), strict=True):
                part.copy_(chunk)
        tied.data.copy_(loaded["0.weight"])
        session.settle()
    for name, dest in model.filled.items():
        expected = extrapolate(base[name], aligned[name], alpha, name if rounding == "dithered" else None)
        assert same_bits(dest, expected), name
    assert same_bits(tied.data, model.filled["0.weight"])


def _shards(tensor: torch.Tensor, number: int) -> tuple[torch.Tensor, ...]:
    """Along the last dimension, as row-parallel layers take theirs."""
    return tensor.tensor_split(number, dim=-1)


MANY_BASE, MANY_ALIGNED = (
    {f"{index}.weight": numbers(8, 8, seed=seed + index) for index in range(60)} for seed in (0, 100)
)
"""Sixty tensors of 128 bytes a side."""


@pytest.fixture
def many(lazies: Lazies) -> Plan:
    """Their plan, with alpha 0.5."""
    return lazies.plan(MANY_BASE, MANY_ALIGNED)


def load(plan: Plan, threads: int = 4) -> dict[str, torch.Tensor]:
    """Copy every tensor of a plan as a loader does; returns what they were copied into."""
    model = Parameters(plan)
    with load_into(model, threads) as session:
        for name, dest in model.filled.items():
            dest.copy_(lazy_tensor(plan.tensors[name], session))
        session.settle()
    return model.filled


def threads_left() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("expo-")]


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int = 30) -> None:
    """Let reads fail after some."""
    before_reads(monkeypatch, fail_from(after, error))
    monkeypatch.setattr(kernels, "available", lambda *_: False)  # its reads are not Python's


def test_a_read_error_ends_the_load_with_its_cause(many: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, OSError(errno.EIO, os.strerror(errno.EIO)))
    with pytest.raises(CheckpointError, match=r"weight' cannot be read: Input/output error"):
        load(many)
    assert threads_left() == []


def test_a_file_that_shrinks_under_it_ends_the_load(lazies: Lazies) -> None:
    tensors = {f"{index}.weight": numbers(8, 8, seed=index) for index in range(60)}
    plan = lazies.plan(tensors, tensors)
    model = Parameters(plan)
    file = next(iter(plan.tensors.values())).aligned.file
    with load_into(model, 4) as session:
        loaded = [lazy_tensor(tensor, session) for tensor in plan.tensors.values()]
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(CheckpointError, match="is cut: the file has become shorter"):
            _copy_all(loaded, model, session)
    assert threads_left() == []


def _copy_all(loaded: list[LazyTensor], model: Parameters, session: ModelSession) -> None:
    for dest, tensor in zip(model.filled.values(), loaded, strict=True):
        dest.copy_(tensor)
    session.settle()


@pytest.mark.parametrize("error", [SystemExit(3), MemoryError("no"), RuntimeError("dead")])
def test_a_thread_that_dies_ends_the_load(many: Plan, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    failing(monkeypatch, error)
    with pytest.raises(type(error)):
        load(many)
    assert threads_left() == []


def test_a_failure_stays_for_whoever_swallows_it(many: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, OSError(errno.EIO, os.strerror(errno.EIO)))
    model = Parameters(many)
    with load_into(model, 2) as session:
        for name, dest in model.filled.items():
            try:
                dest.copy_(lazy_tensor(many.tensors[name], session))
            except CheckpointError:
                continue
        with pytest.raises(CheckpointError, match="Input/output error"):
            session.settle()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_failure_at_once_stays_too(many: Plan, threads: int) -> None:
    """What goes onto a device, or where there is one thread, is done on the spot."""
    dest = torch.empty(8) if threads == 2 else torch.nn.Parameter(torch.empty(8), requires_grad=False)
    model = torch.nn.Module()
    model.register_parameter("a", dest if isinstance(dest, torch.nn.Parameter) else None)

    def fail() -> None:
        raise CheckpointError("Input/output error")

    with load_into(model, threads) as session:
        with pytest.raises(CheckpointError):
            session.submit(dest, fail)
        with pytest.raises(CheckpointError, match="Input/output error"):
            session.settle()


def test_a_value_that_is_not_finite_ends_the_load(lazies: Lazies) -> None:
    tensors = {f"{index}.weight": numbers(8, 8, seed=index) for index in range(60)}
    tensors["40.weight"][3, 3] = torch.nan
    plan = lazies.plan(tensors, tensors)
    with pytest.raises(ValuesError, match=r"'40\.weight' in .* holds NaN or Inf"):
        load(plan)


def test_memory_that_is_refused_is_named(many: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    case, counts = next(iter(many.tensors.values())), Counts()
    tensor, dest = lazy_tensor(case, LoadSession(Reader(), counts)), torch.empty(8, 8, dtype=torch.bfloat16)
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(LoadError, match=r"out of memory: cannot allocate a 2 MiB read buffer for base"):
        dest.copy_(tensor)


@pytest.mark.parametrize("is_cold", [False, True])
@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_threads_that_are_refused_are_done_without(
    many: Plan, monkeypatch: pytest.MonkeyPatch, allowed: int, is_cold: bool
) -> None:
    monkeypatch.setattr(FileSpan, "is_cached", lambda part: not is_cold)
    started, start = itertools.count(), threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if next(started) >= allowed:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    base, aligned = MANY_BASE, MANY_ALIGNED
    found = load(many)
    assert len(found) == len(aligned)
    assert [name for name in aligned if not same_bits(found[name], extrapolate(base[name], aligned[name], 0.5))] == []
    assert next(started) > allowed, "no thread was refused"


def _to_the_process() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _to_this_thread() -> None:
    """As where it comes just before the main thread begins to wait: no system call of that thread is interrupted."""
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)


@pytest.mark.parametrize("send", [_to_the_process, _to_this_thread])
def test_ctrl_c_in_the_middle_ends_it_though_a_read_hangs(
    many: Plan, monkeypatch: pytest.MonkeyPatch, send: Callable[[], None]
) -> None:
    hangs, go_on = threading.Event(), threading.Event()

    def hang(_: Read) -> None:
        hangs.set()
        go_on.wait(30)

    def interrupt() -> None:
        hangs.wait(10)
        send()

    before_reads(monkeypatch, hang)
    monkeypatch.setattr(kernels, "available", lambda *_: False)
    monkeypatch.setattr(threads_module, "JOIN_SECONDS", 0.2)
    threading.Thread(target=interrupt).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        load(many)
    assert time.monotonic() - started < 5
    go_on.set()
    for thread in threading.enumerate():
        if thread.name.startswith("expo-"):
            thread.join(10)
    assert threads_left() == []
