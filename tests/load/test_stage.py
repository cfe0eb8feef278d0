"""The way onto a device, simulated: a device that is as late as it may be, and reorders what it may."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expo_serve.config import Method
from expo_serve.errors import CheckpointError, ExpoError, LoadError, ValuesError
from expo_serve.load import stage as stage_module
from expo_serve.load import stages as stages_module
from expo_serve.load.counts import Counts
from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.reader import Reader
from expo_serve.load.session import LoadSession
from expo_serve.load.sizes import MAX_DEVICE_SHARE as MAX_SHARE
from expo_serve.load.sizes import STAGE_BYTES, STAGE_TURNS
from expo_serve.load.stage import Stage
from expo_serve.load.stages import Stages
from expo_serve.plan.plan import Plan, PlannedTensor
from tests.faults import Read, before_reads, fail_from
from tests.load.lazies import NAME, Lazies, numbers
from tests.load.rigs import Rig, rig
from tests.load.simulator import Simulator
from tests.models.raw import same_bits
from tests.models.reference import extrapolate

LAYERS = 5


@pytest.fixture(scope="module")
def lazies(tmp_path_factory: pytest.TempPathFactory) -> Lazies:
    return Lazies(tmp_path_factory.mktemp("staging"))


def one(lazies: Lazies, base: torch.Tensor, aligned: torch.Tensor, alpha: float = 0.5) -> PlannedTensor:
    """A planned tensor of these sides."""
    return lazies.plan({NAME: base}, {NAME: aligned}, alpha).tensors[NAME]


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
    stage_bytes=st.integers(64, 8000),
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
    planned = lazies.plan({NAME: base}, {NAME: aligned}, alpha, rounding).tensors[NAME]
    expected = view(extrapolate(base, aligned, alpha, NAME if rounding == "dithered" else None))
    with rig(seed, stage_bytes, turns) as there:
        assert same_bits(there.copied(view(there.lazy(planned)), dest), expected.to(dest or expected.dtype))


def layers(lazies: Lazies, rows: int = 12) -> tuple[Plan, dict[str, torch.Tensor]]:
    """A plan of layers that are alike, and what must come out."""
    base = {
        f"model.layers.{layer}.{part}": numbers(rows, 8, seed=10 * layer + place)
        for layer in range(LAYERS)
        for place, part in enumerate(("q", "k", "up", "down"))
    }
    aligned = {name: value + numbers(rows, 8, seed=99) / 8 for name, value in base.items()}
    expected = {name: extrapolate(base[name], aligned[name], 0.5) for name in base}
    return lazies.plan(base, aligned), expected


def load(there: Rig, plan: Plan, take: Callable[[str, Any], Any]) -> dict[str, torch.Tensor]:
    """Give a model each tensor in turn; it takes a view of it, or nothing."""
    lazy = {name: there.lazy(planned) for name, planned in plan.tensors.items()}
    found = {}
    for one in lazy.values():
        there.stages.announce(one.pending)
    with there.simulator.model():
        for name, tensor in lazy.items():
            if (view := take(name, tensor)) is not None:
                found[name] = torch.full(view.shape, 7, dtype=view.dtype)
                found[name].copy_(view)
                if name.endswith("up"):  # the model looks at some of them at once
                    found[name] = found[name] + 0
            there.stages.finish(tensor.pending)
    there.stages.wait()
    return found


def late_layers(lazies: Lazies) -> tuple[Plan, dict[str, torch.Tensor]]:
    """A plan of layers whose first matrix is larger than the others (grouped queries)."""
    rows = {"q": 64, "k": 16, "v": 16}
    names = {f"model.layers.{layer}.{part}": size for layer in range(LAYERS) for part, size in rows.items()}
    base = {name: numbers(size, 8, seed=place) for place, (name, size) in enumerate(names.items())}
    aligned = {name: value + numbers(*value.shape, seed=99) / 8 for name, value in base.items()}
    return lazies.plan(base, aligned), {name: extrapolate(base[name], aligned[name], 0.5) for name in base}


def slices(name: str, tensor: Any) -> Any:
    """Take what a rank takes: rows, columns, all, or nothing of some layer."""
    if name == "model.layers.3.k":
        return None
    return {"q": tensor[4:8], "k": tensor, "up": tensor[:6], "down": tensor[:, 2:6]}[name.rpartition(".")[2]]


def surprising(name: str, tensor: Any) -> Any:
    """Take something else in each layer."""
    return tensor[int(name.split(".")[2]) :] if "down" not in name else tensor.t()


@pytest.mark.parametrize("take", [slices, surprising])
@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize(("stage_bytes", "turns"), [(64, 1), (128, 3), (1000, 4), (100_000, 6)])
def test_what_is_read_ahead_has_the_same_bits(
    lazies: Lazies, take: Callable[[str, Any], Any], seed: int | None, stage_bytes: int, turns: int
) -> None:
    plan, expected = layers(lazies)
    with rig(seed, stage_bytes, turns) as there:
        found = load(there, plan, take)
    for name, value in expected.items():
        wanted = take(name, value)
        assert (wanted is None) == (name not in found)
        assert wanted is None or same_bits(found[name], wanted)


def test_layers_after_the_first_are_read_ahead(lazies: Lazies, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _ = layers(lazies)
    ahead: list[bool] = []
    find = Stage._piece

    def noted(stage: Stage, *arguments: Any) -> Any:
        piece = find(stage, *arguments)
        ahead.append(piece.turn is not None)
        return piece

    monkeypatch.setattr(Stage, "_piece", noted)
    with rig(stage_bytes=1000, turns=4) as there:
        load(there, plan, slices)
        assert there.simulator.calls.count("upload") < len(ahead)  # small ones go together
    assert ahead == [False] * 4 + [True] * (len(ahead) - 4)


PLANTED = {
    "a turn is read into before it has been copied": ("_do", "no wait for the copy"),
    "a turn is copied into before it has been combined": ("upload", "no wait for the combining"),
    "a piece is combined before it has been copied": ("run", "no wait for the copy"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_missing_wait_is_seen(lazies: Lazies, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The simulator is late enough: without this wait the result is wrong."""
    where, _ = PLANTED[fault]
    if where == "_do":

        def do(task: Any, piece: Any, turn: Any, arrived: Any) -> None:
            task()
            arrived()

        monkeypatch.setattr(stage_module, "_do", do)
    elif where == "upload":
        upload = Simulator.upload
        monkeypatch.setattr(Simulator, "upload", lambda self, dest, source, after: upload(self, dest, source, []))
    else:
        run = Simulator.run
        monkeypatch.setattr(Simulator, "run", lambda self, work, after: run(self, work, ()))
    base, aligned = numbers(50, 8), numbers(50, 8, seed=1)
    with rig(turns=2) as there:
        lazy = there.lazy(one(lazies, base, aligned))
        if where == "upload":  # the copies run ahead of the combining
            there.simulator.copies_run_ahead = True
        try:
            found = there.copied(lazy)
        except ExpoError:
            return  # poison is not finite
        assert not torch.equal(found, extrapolate(base, aligned, 0.5))


def test_what_the_model_frees_is_not_written_to_afterwards(lazies: Lazies) -> None:
    """Its memory may be given to another tensor at once, also in a pool that gives nothing back."""
    with rig() as there, there.simulator.model():
        dest = torch.full((50, 8), 7, dtype=torch.bfloat16)
        dest.copy_(there.lazy(one(lazies, numbers(50, 8), numbers(50, 8, seed=1))))
        again = dest.view(torch.int16)  # another tensor with this memory
        again.fill_(3)
        there.stages.wait()
        assert again.eq(3).all()


def test_the_order_against_the_model_needs_no_look_at_its_operations(lazies: Lazies) -> None:
    """All that touches the parameter is on the model's stream before ``copy_`` returns."""
    base, aligned = numbers(50, 8), numbers(50, 8, seed=1)
    with rig() as there:
        dest = torch.zeros(50, 8, dtype=torch.bfloat16)
        before: list[torch.Tensor] = []
        after: list[torch.Tensor] = []
        there.simulator.run(lambda: before.append(dest.clone()), ())
        dest.copy_(there.lazy(one(lazies, base, aligned)))
        there.simulator.run(lambda: after.append(dest.clone()), ())
        there.simulator.model_goes_on()
    assert before[0].eq(0).all()
    assert same_bits(after[0], extrapolate(base, aligned, 0.5))


@pytest.mark.parametrize(("total", "turn"), [(1 << 40, STAGE_BYTES), (3 << 30, 8 << 20), (384 << 20, 1 << 20)])
def test_device_memory_is_bounded_by_the_buffers(total: int, turn: int) -> None:
    simulator = Simulator(total=total)
    stage = Stage(simulator, threads=1)
    assert stage.turn_bytes == turn
    assert simulator.allocated <= min(512 << 20, total // MAX_SHARE) + STAGE_TURNS * 256
    stage.close()


def test_closed_stage_holds_no_memory(lazies: Lazies, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM empties the pool of sleep mode right after the load; and a thread that goes on can abort a process's end."""
    memories: list[weakref.ref[torch.Tensor]] = []
    new = Simulator.host_memory

    def host_memory(self: Simulator, size: int) -> torch.Tensor:
        memory = new(self, size)
        memories.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(Simulator, "host_memory", host_memory)
    base, aligned = numbers(500, 8), numbers(500, 8, seed=1)
    with rig(turns=8) as there:
        there.copied(there.lazy(one(lazies, base, aligned)))
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("expo-stage")] == []
    del there
    gc.collect()
    assert len(memories) > 8
    assert [memory() for memory in memories if memory() is not None] == []


@pytest.mark.parametrize(("side", "alpha"), [("base", 0.5), ("aligned", 0.5), ("aligned", 0), ("base", -1)])
@pytest.mark.parametrize("row", [0, 30, 49])
def test_value_that_is_not_finite_names_tensor_and_file(lazies: Lazies, side: str, alpha: float, row: int) -> None:
    operands = {"base": numbers(50, 8), "aligned": numbers(50, 8, seed=1)}
    operands[side][row, 3] = torch.inf
    with rig() as there:
        lazy = there.lazy(one(lazies, operands["base"], operands["aligned"], alpha))
        for _ in range(2):  # whoever swallows it the first time meets it again
            with pytest.raises(ValuesError, match=rf"'{NAME}' in .*/{side}/model.safetensors holds NaN"):
                there.copied(lazy)


def test_result_that_is_too_large_says_so(lazies: Lazies) -> None:
    with rig() as there:
        lazy = there.lazy(one(lazies, torch.full((2, 2), -6e4).half(), torch.full((2, 2), 6e4).half(), 2))
        with pytest.raises(ValuesError, match="alpha 2 it is too large for its dtype"):
            there.copied(lazy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_finite_values_with_an_infinite_sum_are_no_alarm(lazies: Lazies, dtype: torch.dtype) -> None:
    values = torch.full((4, 8), torch.finfo(dtype).max, dtype=dtype)
    with rig() as there:
        assert same_bits(there.copied(there.lazy(one(lazies, values, values.clone()))), values)


def test_a_mask_may_be_infinite_and_integers_are_copied(lazies: Lazies) -> None:
    tensors = {"h.attn.masked_bias": torch.tensor([-torch.inf]), "ids": torch.arange(40)}
    plan = lazies.plan(tensors, tensors)
    with rig() as there:
        for name, expected in tensors.items():
            assert same_bits(there.copied(there.lazy(plan.tensors[name])), expected)


def test_storage_that_fails_ends_it_with_the_cause(lazies: Lazies, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = one(lazies, numbers(50, 8), numbers(50, 8, seed=1))
    before_reads(monkeypatch, fail_from(8, OSError(errno.EIO, os.strerror(errno.EIO))))
    with rig() as there, pytest.raises(CheckpointError, match=f"'{NAME}' cannot be read: Input/output error"):
        there.copied(there.lazy(planned))


def test_what_is_read_ahead_in_vain_may_fail(lazies: Lazies, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the model asks for can end its load."""
    plan, expected = layers(lazies)
    names = list(expected)
    with rig(stage_bytes=1000, turns=4) as there:
        lazy = {name: there.lazy(planned) for name, planned in plan.tensors.items()}
        for tensor in lazy.values():
            there.stages.announce(tensor.pending)
        for name in names[:4]:
            there.copied(lazy[name])
            if name == names[3]:
                before_reads(monkeypatch, fail_from(0, OSError(errno.EIO, os.strerror(errno.EIO))))
            there.stages.finish(lazy[name].pending)
        for name in names[4:]:
            there.stages.finish(lazy[name].pending)
        there.stages.wait()


def test_devices_without_a_queue_of_their_own_are_copied_to(tmp_path: Path) -> None:
    with Stages() as stages:
        assert stages.onto(torch.device("cpu")) is None
        case = Lazies(tmp_path).make(numbers(6, 8), numbers(6, 8, seed=1))
        lazy = lazy_tensor(case.lazy.pending.planned, LoadSession(Reader(), Counts(), stages=stages))
        assert same_bits(torch.empty(6, 8, dtype=torch.bfloat16).copy_(lazy), case.expected)
        stages.finish(lazy.pending)
        stages.wait()


def test_nothing_is_staged_after_the_load() -> None:
    with Stages() as stages:
        pass
    assert stages.onto(torch.device("cuda", 0)) is None


def test_an_error_in_the_middle_sets_everything_free(lazies: Lazies, monkeypatch: pytest.MonkeyPatch) -> None:
    base, aligned = numbers(50, 8), numbers(50, 8, seed=1)
    planned = one(lazies, base, aligned)
    with rig(turns=4) as there:
        stage = there.stages.onto(torch.device("cpu"))
        assert stage is not None
        with monkeypatch.context() as patch:
            before_reads(patch, fail_from(3, OSError(errno.EIO, os.strerror(errno.EIO))))
            with pytest.raises(CheckpointError, match="Input/output error"):
                there.copied(there.lazy(planned))
        assert len(stage._free) == 4
        assert same_bits(there.copied(there.lazy(planned)), extrapolate(base, aligned, 0.5))


def test_what_goes_to_two_places_in_each_layer(lazies: Lazies) -> None:
    plan, expected = layers(lazies)
    with rig(stage_bytes=1000, turns=4) as there, there.simulator.model():
        lazy = {name: there.lazy(planned) for name, planned in plan.tensors.items()}
        for tensor in lazy.values():
            there.stages.announce(tensor.pending)
        for name, tensor in lazy.items():
            for _ in range(2):
                assert same_bits(torch.zeros_like(expected[name]).copy_(tensor), expected[name])
            there.stages.finish(tensor.pending)


def test_layer_that_takes_all_of_its_tensors_with_the_last_one(lazies: Lazies) -> None:
    """As vLLM does where it quantises while it loads, and when it loads anew: what came so says nothing of the next."""
    plan, expected = late_layers(lazies)
    with rig(stage_bytes=2000, turns=4) as there:
        lazy = {name: there.lazy(planned) for name, planned in plan.tensors.items()}
        for tensor in lazy.values():
            there.stages.announce(tensor.pending)
        found: dict[str, torch.Tensor] = {}
        waiting: dict[str, torch.Tensor] = {}
        for name, tensor in lazy.items():
            waiting[name] = tensor
            if name.endswith("v"):
                found |= {other: there.copied(one) for other, one in waiting.items()}
                waiting = {}
            there.stages.finish(tensor.pending)
    for name, value in expected.items():
        assert same_bits(found[name], value)
    size = sum(record.nbytes for planned in plan.tensors.values() for record in planned.records)
    assert there.simulator.uploaded <= 1.05 * size


def layer_by_layer(there: Rig, plan: Plan, happen: Callable[[], object]) -> None:
    """Load all layers; something happens after the first of them."""
    lazy = [there.lazy(planned) for planned in plan.tensors.values()]
    for tensor in lazy:
        there.stages.announce(tensor.pending)
    for number, tensor in enumerate(lazy):
        there.copied(tensor)
        if number == 3:
            happen()
        there.stages.finish(tensor.pending)


def test_what_cannot_be_begun_is_nobodys_wait(lazies: Lazies, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), rig(stage_bytes=1000, turns=4) as there:
        layer_by_layer(there, layers(lazies)[0], lambda: monkeypatch.setattr(Stage, "_reads", interrupt))


def test_failed_load_does_not_wait_for_a_read_that_hangs(lazies: Lazies, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, is_over = Event(), Event()

    def read(_: Read) -> None:
        if hangs.is_set():
            is_over.wait(60)

    def hang() -> None:
        """What is read ahead hangs, and what the model asks for next fails for another reason."""
        hangs.set()
        monkeypatch.setattr(Stage, "fill", refuse)

    def refuse(*_: object) -> None:
        raise RuntimeError("the model refuses something")

    before_reads(monkeypatch, read)
    monkeypatch.setattr(stages_module, "_PATIENCE_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="the model refuses"), rig(stage_bytes=1000, turns=4) as there:
        layer_by_layer(there, layers(lazies)[0], hang)
    is_over.set()
    assert time.monotonic() - began < 30


def test_values_that_only_the_device_makes_not_finite(lazies: Lazies, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = one(lazies, numbers(4, 4), numbers(4, 4, seed=1))
    compute = stage_module._compute

    def spoil(out: torch.Tensor, *others: Any) -> None:
        compute(out, *others)
        out.fill_(torch.nan)
        others[-1].fill_(torch.nan)

    monkeypatch.setattr(stage_module, "_compute", spoil)
    with rig() as there, pytest.raises(LoadError, match="where the host's are; please report this"):
        there.copied(there.lazy(planned))


def test_sum_that_overflows_is_no_error(lazies: Lazies) -> None:
    largest = torch.full((64, 64), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    with rig(stage_bytes=1 << 15) as there:
        assert same_bits(there.copied(there.lazy(one(lazies, largest, largest))), largest)
