"""Deltas on their way onto a simulated device: whatever goes there, the bits are those of the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from expo_serve import kernels
from expo_serve.errors import ValuesError
from expo_serve.load import device_low_rank, formula
from expo_serve.load.device_low_rank import has_the_rules_bits
from expo_serve.load.lora import Factors
from expo_serve.plan.plan import Plan
from loadtests.device_check.stage import counted_ways
from tests.deltas.test_packed_views import COLUMNS, NAMES, ROWS, VIEWS, View, moved
from tests.load.lazies import Lazies, numbers
from tests.load.rigs import rig
from tests.models.adapters import factors, plan_delta, write_adapter
from tests.models.packs import SMALL_BLOCK, UP, Pack, Packs, blocks_of, tensors_of_each_coding
from tests.models.raw import same_bits, write_raw

BASE_WEIGHT = "model.layers.0.mlp.up_proj.weight"
RANK, INPUTS, OUTPUTS = 5, 48, 40


@pytest.fixture
def chosen() -> Iterator[Counter[str]]:
    """How many pieces went which way."""
    with counted_ways() as ways:
        yield ways


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pack]:
    """A packed delta of several tensors, in small blocks."""
    base = {UP: numbers(ROWS, COLUMNS), NAMES[1]: numbers(26, 12, 3), NAMES[3]: numbers(20, 11)}
    aligned = {name: moved(tensor, number) for number, (name, tensor) in enumerate(base.items(), 3)}
    aligned[NAMES[3]] = torch.cat([aligned[NAMES[3]], numbers(7, 11, seed=9)])
    base[NAMES[2]] = numbers(30, 11, dtype=torch.float32)
    aligned[NAMES[2]] = moved(base[NAMES[2]], 11).half()
    with blocks_of(SMALL_BLOCK):
        yield Packs(tmp_path_factory.mktemp("staged")).make(base, aligned, aligned_config={"vocab_size": 27})


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("stage_bytes", [300, 2000, 100_000])
def test_view_of_a_packed_tensor(pack: Pack, view: View, stage_bytes: int) -> None:
    for alpha in (-1, 0, 0.5):
        plan = pack.by_delta(alpha)
        for name in NAMES:
            with rig(seed=3, stage_bytes=stage_bytes, turns=3) as there:
                found = there.copied(view(there.lazy(plan.tensors[name])))
            assert same_bits(found, view(pack.expected(name, alpha))), (name, alpha)


def test_blocks_of_every_coding(tmp_path: Path, chosen: Counter[str]) -> None:
    with blocks_of(SMALL_BLOCK):
        made = Packs(tmp_path).make(*tensors_of_each_coding(), unmatched="copy", aligned_config={"vocab_size": 15})
    plan, by_pair = made.by_delta(0.5), made.by_pair(0.5)
    with rig(stage_bytes=4000) as there, rig() as other:
        for name, planned in plan.tensors.items():
            assert same_bits(there.copied(there.lazy(planned)), other.copied(other.lazy(by_pair.tensors[name]))), name
    assert chosen["PackedTransfer"] >= 2


def test_another_base_is_refused(pack: Pack) -> None:
    plan = pack.by_delta(0.5)
    file = plan.tensors[UP].base
    assert file is not None
    content = bytearray(file.file.read_bytes())
    kept = bytes(content)
    content[file.offset + 40] ^= 1
    file.file.write_bytes(content)
    try:
        with rig(stage_bytes=2000) as there, pytest.raises(ValuesError, match="base is not the one that the delta was"):
            there.copied(there.lazy(plan.tensors[UP]))
    finally:
        file.file.write_bytes(kept)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter of one matrix."""
    folder = tmp_path_factory.mktemp("adapted")
    base = write_raw(folder / "base", {BASE_WEIGHT: numbers(OUTPUTS, INPUTS)})
    adapter = write_adapter(
        folder / "adapter", factors(BASE_WEIGHT.removesuffix(".weight"), OUTPUTS, INPUTS, RANK), r=RANK
    )
    return base, adapter


@pytest.fixture
def fuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose product has the bits of the host's: it is computed by the host's loop."""

    def product(factors: Factors, rows: range, columns: range) -> torch.Tensor:
        out = torch.empty(len(rows), len(columns), dtype=torch.float32, device="cpu")
        factors.product(rows, columns, out)
        return out

    monkeypatch.setattr(device_low_rank, "product", product)
    monkeypatch.setattr(device_low_rank, "has_the_rules_bits", lambda device: True)


LORA_VIEWS: dict[str, View] = {
    "whole": lambda t: t,
    "rows": lambda t: t[8:24],
    "columns": lambda t: t[:, 6:30],
    "turned": lambda t: t.t(),
    "scattered": lambda t: t[::3, ::5],
}


@pytest.mark.parametrize("view", LORA_VIEWS.values(), ids=LORA_VIEWS)
@pytest.mark.parametrize("rounding", ["nearest", "dithered"])
@pytest.mark.parametrize("is_fusing", [True, False])
def test_view_of_an_adapted_tensor(
    adapted: tuple[Path, Path],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    chosen: Counter[str],
    view: View,
    rounding: str,
    is_fusing: bool,
) -> None:
    if is_fusing:
        request.getfixturevalue("fuses")
    else:
        monkeypatch.setattr(device_low_rank, "has_the_rules_bits", lambda device: False)
    plan = plan_delta(*adapted, 0.5, rounding=rounding)
    for stage_bytes in (700, 3000, 100_000):
        with rig(seed=5, stage_bytes=stage_bytes) as there:
            lazy = there.lazy(plan.tensors[BASE_WEIGHT])
            assert same_bits(there.copied(view(lazy)), view(lazy.materialize()))
    is_scattered = view is LORA_VIEWS["scattered"]
    assert ("LowRankTransfer" in chosen) == (is_fusing and not is_scattered)


def test_a_damaged_adapter_is_refused(adapted: tuple[Path, Path], tmp_path: Path, fuses: None) -> None:
    tensors = factors(BASE_WEIGHT.removesuffix(".weight"), OUTPUTS, INPUTS, RANK)
    next(iter(tensors.values()))[0, 0] = torch.nan
    plan = plan_delta(adapted[0], write_adapter(tmp_path, tensors, r=RANK), 0.5)
    with rig() as there, pytest.raises(ValuesError, match="holds NaN or Inf; the adapter is damaged"):
        there.copied(there.lazy(plan.tensors[BASE_WEIGHT]))


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    """vLLM loads a model with the model's dtype as the default one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("default_dtype")
def test_a_device_that_fuses_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch, "add", lambda one, other, alpha: formula._fused_step(one, other, alpha))
    assert formula._adds_with_one_rounding(cpu)
    monkeypatch.setattr(torch, "add", lambda one, other, alpha: one + alpha * other)
    assert not formula._adds_with_one_rounding(cpu)


@pytest.mark.usefixtures("default_dtype")
def test_the_cpu_is_probed_and_does_not_fuse_or_has_the_bits() -> None:
    """Whatever this processor does, the probe decides by bits."""
    has_the_rules_bits.cache_clear()
    left, right = torch.randn(9, 4).float(), torch.randn(4, 33).float()
    wanted = torch.empty(9, 33, dtype=torch.float32)
    Factors(left, right, 0.5).product(range(9), range(33), wanted)
    if has_the_rules_bits(torch.device("cpu")):
        assert torch.equal(device_low_rank.product(Factors(left, right, 0.5), range(9), range(33)), wanted)


def test_product_of_zeros_has_the_sign_of_the_rule() -> None:
    """An adapter that was not trained has such a factor; base's -0.0 is +0.0 with it."""
    factors = Factors(torch.zeros(3, 2), -torch.ones(2, 3), 0.5)
    assert not device_low_rank.product(factors, range(3), range(3)).signbit().any()


_FREE = ("empty", "promote_types", "set_", "resolve_conj", "resolve_neg")
"""Operations that launch nothing."""


class _Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations for which a device would launch a kernel or a copy."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(_FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launches(plan: Plan, name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Load a tensor as one piece; returns what a device is given."""
    monkeypatch.setattr(kernels, "available", lambda *loops: False)  # of the CPU
    with rig(stage_bytes=1 << 20) as there:
        lazy = there.lazy(plan.tensors[name])
        there.copied(lazy)  # factors go onto the device once
        dest = torch.empty(lazy.shape, dtype=lazy.dtype)
        there.simulator.calls.clear()
        works = there.simulator.works = []
        dest.copy_(lazy)
        there.stages.wait()
        with _Launches() as seen:
            for work in works:
                work()
        return [*seen.names, *["upload"] * there.simulator.calls.count("upload")]


@pytest.mark.parametrize("rounding", ["nearest", "dithered"])
def test_launches_a_piece(
    tmp_path: Path, adapted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, rounding: Any
) -> None:
    """A kernel takes a device some microseconds, whatever it does: few for each piece."""
    size = torch.Size((64, 64))
    sides = {UP: numbers(*size)}, {UP: moved(numbers(*size), 3)}
    pair = Lazies(tmp_path).plan(*sides, 0.5, rounding)
    base, aligned = ({UP: numbers(*size, seed=seed, dtype=torch.float16)} for seed in (0, 1))
    half_pair = Lazies(tmp_path / "halves").plan(base, aligned, 0.5, rounding)
    with blocks_of(1 << 20):
        packed = Packs(tmp_path / "packs").make(*sides).by_delta(0.5, rounding=rounding)
    lora = plan_delta(*adapted, 0.5, rounding=rounding)
    more = 0 if rounding == "nearest" else 16
    pairs = ((pair, UP, 6 + more), (half_pair, UP, 6 + more))
    bounds = (*pairs, (lora, BASE_WEIGHT, 8 + RANK + more), (packed, UP, 20 + more))
    for plan, name, most in bounds:
        with monkeypatch.context() as patch:
            patch.setattr(device_low_rank, "has_the_rules_bits", lambda device: True)
            patch.setattr(formula, "fuses_addition", lambda device: True)
            names = launches(plan, name, patch)
        assert len(names) <= most, (name, Counter(names))
