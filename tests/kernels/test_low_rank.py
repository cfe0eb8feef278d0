"""The product of two factors, added where it is wanted: whatever part is asked for has the bits of the whole."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expo_serve import kernels
from expo_serve.errors import ValuesError
from expo_serve.kernels import compiling, low_rank
from expo_serve.load.counts import Counts
from expo_serve.load.lazy import LazyTensor, lazy_tensor
from expo_serve.load.reader import Reader
from expo_serve.load.session import LoadSession
from tests.load.lazies import numbers
from tests.models.adapters import factors, plan_delta, units_apart, write_adapter
from tests.models.raw import same_bits, write_raw

MODULE = "model.layers.0.self_attn.q_proj"
NAME = f"{MODULE}.weight"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Tensors = dict[str, torch.Tensor]
View = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, repr=False)
class Case:
    """One tensor with a low-rank step, and what it is made of."""

    lazy: LazyTensor
    base: torch.Tensor
    step: torch.Tensor
    """In fp64, times 1 + alpha."""
    counts: Counts

    @property
    def expected(self) -> torch.Tensor:
        """In fp64, rounded once."""
        return (self.base.double() + self.step).to(self.base.dtype)


class Cases:
    """Makes them in files of ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._made = folder, 0

    def make(self, base: torch.Tensor, adapter: Tensors | None = None, alpha: float = 0.5, **config: Any) -> Case:
        """A tensor and its adapter, by default a random one of rank 3."""
        self._made += 1
        folder = self._folder / str(self._made)
        adapter = factors(MODULE, len(base), base.shape[1], rank=3) if adapter is None else adapter
        config = {"r": len(adapter[A]), "lora_alpha": 6, **config}
        delta = write_adapter(folder / "delta", adapter, **config)
        plan = plan_delta(write_raw(folder / "base", {NAME: base}), delta, alpha)
        scale = (1 + alpha) * config["lora_alpha"] / config["r"]
        step = (adapter[B].double().flatten(1) @ adapter[A].double().flatten(1)).reshape(base.shape)
        counts = Counts()
        return Case(lazy_tensor(plan.tensors[NAME], LoadSession(Reader(), counts)), base, scale * step, counts)


@pytest.fixture
def cases(tmp_path: Path) -> Cases:
    return Cases(tmp_path)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Sizes that no vector, block of rows or panel of columns divides."""
    return Cases(tmp_path_factory.mktemp("cases")).make(numbers(37, 615, dtype=request.param))


def copied(lazy: LazyTensor, view: View) -> torch.Tensor:
    """A copy of a view, as a model's loader takes it."""
    taken = view(lazy)
    return torch.empty(taken.shape, dtype=taken.dtype).copy_(taken)


def test_this_machine_has_the_loops() -> None:
    """Much of what is below would pass without them."""
    assert kernels.available("low_rank.product", "low_rank.stream"), kernels.reason()


def test_whole_is_the_product_added_once(case: Case) -> None:
    whole = copied(case.lazy, lambda t: t)
    assert not torch.equal(whole, case.base)
    assert_close(whole, case)


def assert_close(found: torch.Tensor, case: Case) -> None:
    """Within a unit in the last place, and nearly all the same; of fp32 within the errors of the product."""
    if found.dtype == torch.float32:
        assert torch.allclose(found, case.expected, rtol=2e-7, atol=1e-9)
        return
    assert units_apart(found, case.expected).max() <= 1
    assert (found == case.expected).double().mean() > 0.999


VIEWS: dict[str, View] = {
    "rows": lambda t: t[5:29],
    "one row": lambda t: t[36:],
    "columns": lambda t: t.narrow(1, 3, 77),
    "last columns": lambda t: t[:, 600:],
    "one column": lambda t: t[:, 614],
    "one element": lambda t: t[11, 13],
    "rows and columns": lambda t: t[9:20, 510:520],
    "every third row": lambda t: t[::3],
    "every second column": lambda t: t[:, 1::2],
    "both strided": lambda t: t[2::5, 7::11],
    "transposed": lambda t: t.t(),
    "transposed, narrowed": lambda t: t.t()[100:200, 3:8],
    "flat from the middle of a row": lambda t: t.flatten()[1000:9000],
    "flat within a row": lambda t: t.flatten()[620:700],
    "flat over one row's end": lambda t: t.flatten()[610:620],
    "flat, strided": lambda t: t.flatten()[17::613],
    "diagonal": lambda t: t.diagonal(),
    "other rows": lambda t: t.reshape(615, 37),
    "groups of columns": lambda t: t.view(37, 5, 123).transpose(0, 1),
    "windows that overlap": lambda t: t.unfold(1, 40, 25),
    "repeated": lambda t: t[:, :1].expand(37, 9),
    "no rows": lambda t: t[4:4],
    "no columns": lambda t: t[:, 7:7],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_have_the_bits_of_the_whole(case: Case, view: View) -> None:
    assert same_bits(copied(case.lazy, view), view(copied(case.lazy, lambda t: t)))


PLACES: dict[str, View] = {
    "rows of a larger parameter": lambda t: t.narrow(0, 4, 37)[:, :615],
    "columns of a larger parameter": lambda t: t[:37].narrow(1, 5, 615),
    "every second row": lambda t: t[1:75:2, :615],
    "a parameter that lies transposed": lambda t: t.flatten()[: 37 * 615].view(615, 37).t(),
    "not aligned to anything": lambda t: t.flatten()[1 : 1 + 37 * 615].view(37, 615),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_places_have_the_bits_of_the_whole_and_their_neighbours_stay(case: Case, place: View) -> None:
    parameter = torch.full((80, 630), 7.0, dtype=case.base.dtype)
    expected = parameter.clone()
    place(expected).copy_(copied(case.lazy, lambda t: t))
    place(parameter).copy_(case.lazy)
    assert same_bits(parameter, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_of_the_parameter_comes_after_the_rounding(cases: Cases, dtype: torch.dtype) -> None:
    lazy = cases.make(numbers(12, 40)).lazy
    parameter = torch.empty(12, 40, dtype=dtype).copy_(lazy)
    assert same_bits(parameter, lazy.materialize().to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_pieces_have_the_bits_of_the_whole(cases: Cases, dtype: torch.dtype) -> None:
    """More than a block that a thread takes, and one row that is larger than what is streamed at a time."""
    for shape in ((2100, 2111), (3, 200_001)):
        case = cases.make(numbers(*shape, dtype=dtype))
        whole = copied(case.lazy, lambda t: t)
        assert same_bits(copied(case.lazy, lambda t: t[-1]), whole[-1])
        assert same_bits(copied(case.lazy, lambda t: t[:, 1000:1100]), whole[:, 1000:1100])
        assert_close(whole, case)


@pytest.mark.parametrize("rank", [1, 2, 7, 16, 33])
def test_ranks(cases: Cases, rank: int) -> None:
    case = cases.make(numbers(21, 50), factors(MODULE, 21, 50, rank))
    assert_close(case.lazy.materialize(), case)
    assert same_bits(copied(case.lazy, lambda t: t.t()), case.lazy.materialize().t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_the_factors(cases: Cases, dtype: torch.dtype) -> None:
    adapter = {name: tensor.to(dtype) for name, tensor in factors(MODULE, 21, 50).items()}
    case = cases.make(numbers(21, 50), adapter)
    assert_close(case.lazy.materialize(), case)


def test_kernels_of_a_convolution(cases: Cases) -> None:
    adapter = {A: 0.02 * numbers(3, 5, 2, 2, dtype=torch.float32), B: 0.02 * numbers(6, 3, 1, 1, dtype=torch.float32)}
    case = cases.make(numbers(6, 5, 2, 2), adapter)
    assert_close(case.lazy.materialize(), case)
    assert same_bits(copied(case.lazy, lambda t: t[1:4, :, 1]), case.lazy.materialize()[1:4, :, 1])


def test_one_rounding_whatever_the_way(cases: Cases) -> None:
    """A sum just below the middle of two fp32 values that is just below the middle of two bf16 values: by way of fp64
    it is rounded up twice. Where rows are streamed it is one fused operation."""
    weight, step = 9470693 / 2**23, 14860089 / 2**32
    adapter = {A: torch.full((1, 40), step), B: torch.ones(24, 1)}
    case = cases.make(torch.full((24, 40), 1 + 2**-7).bfloat16(), adapter, alpha=weight - 1, lora_alpha=1)
    assert same_bits(copied(case.lazy, lambda t: t.t()), copied(case.lazy, lambda t: t).t())


@pytest.mark.parametrize("alpha", [-1, 0, 0.5, -3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_compiled_loops_it_is_the_same_sum(
    cases: Cases, without_loops: None, dtype: torch.dtype, alpha: float
) -> None:
    case = cases.make(numbers(37, 65, dtype=dtype), alpha=alpha)
    assert_close(case.lazy.materialize(), case)
    assert_close(copied(case.lazy, lambda t: t.t()).t().contiguous(), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_with_and_without_compiled_loops_values_are_neighbours(
    cases: Cases, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    base = numbers(37, 615, dtype=dtype)
    compiled = cases.make(base).lazy.materialize()
    monkeypatch.setattr(kernels, "available", lambda *_: False)
    assert units_apart(cases.make(base).lazy.materialize(), compiled).max() <= 1


def test_at_minus_one_the_factors_are_not_read(cases: Cases) -> None:
    base = numbers(12, 40)
    base[0] = -0.0
    case = cases.make(base, {A: torch.full((2, 40), torch.nan), B: torch.ones(12, 2)}, alpha=-1)
    assert same_bits(case.lazy.materialize(), base)
    assert case.counts.read_bytes == {"base": base.nbytes}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [A, B])
def test_factor_that_is_not_finite_is_an_error(cases: Cases, name: str, bad: float, dtype: torch.dtype) -> None:
    adapter = factors(MODULE, 12, 40)
    adapter[name][1, 1] = bad
    with pytest.raises(ValuesError, match=rf"'base_model\.model\.{name}' in .*/adapter_model\.safetensors holds NaN"):
        cases.make(numbers(12, 40, dtype=dtype), adapter).lazy.materialize()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("view", [lambda t: t, lambda t: t.t(), lambda t: t[30:, 600:]], ids=["whole", "t", "part"])
def test_base_that_is_not_finite_is_an_error(
    cases: Cases, way: str, dtype: torch.dtype, bad: float, view: View
) -> None:
    base = numbers(37, 615, dtype=dtype)
    base[36, 614] = bad
    case = cases.make(base)
    with pytest.raises(ValuesError, match=f"'{NAME}' in .*/base/model.safetensors holds NaN"):
        copied(case.lazy, view)
    assert copied(case.lazy, lambda t: t[:36]).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_result_that_is_too_large_is_an_error(cases: Cases, dtype: torch.dtype, sign: int) -> None:
    base, adapter = numbers(12, 40, dtype=dtype), factors(MODULE, 12, 40)
    base[11, 39] = sign * torch.finfo(dtype).max
    adapter[A][:, 39], adapter[B][11] = 1e18, sign * (1e18 if dtype != torch.float16 else 1e-15)
    case = cases.make(base, adapter, alpha=8)
    for view in (lambda t: t, lambda t: t.t(), lambda t: t[11]):
        with pytest.raises(ValuesError, match=rf"'{NAME}'.* too large .*\(file .*/adapter_model.safetensors\)"):
            copied(case.lazy, view)


def test_product_of_sound_factors_that_is_too_large_is_not_called_damage(cases: Cases) -> None:
    adapter = {A: torch.full((2, 40), 1e30), B: torch.full((12, 2), 1e30)}
    with pytest.raises(ValuesError, match=rf"'{NAME}'.* too large .*\(file .*/adapter_model.safetensors\)"):
        cases.make(numbers(12, 40), adapter).lazy.materialize()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_are_counted_once_and_base_as_often_as_it_is_read(cases: Cases, dtype: torch.dtype) -> None:
    base, adapter = numbers(12, 40, dtype=dtype), factors(MODULE, 12, 40)
    case = cases.make(base, adapter)
    copied(case.lazy, lambda t: t[:4])
    assert case.counts.read_bytes == {"base": base[:4].nbytes, "delta": adapter[A].nbytes + adapter[B].nbytes}
    copied(case.lazy, lambda t: t[4:].t())
    assert case.counts.read_bytes == {"base": base.nbytes, "delta": adapter[A].nbytes + adapter[B].nbytes}
    assert case.counts.count() == {"extrapolated": 1, "materialized": 0, "copied": 0}


def test_plan_says_what_is_read(cases: Cases) -> None:
    case = cases.make(numbers(12, 40))
    case.lazy.materialize()
    assert case.lazy._pending.planned.read_bytes == case.counts.read_bytes


def test_tiles_of_every_processor_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of a tile depends on the registers; here the other size is compiled too, apart from the cache."""
    monkeypatch.setattr(compiling, "has_feature", lambda name: low_rank._LANES == 16)
    monkeypatch.setattr(compiling, "loop", lambda signature: compiling.helper)
    spec = importlib.util.spec_from_file_location("low_rank_of_others", low_rank.__file__)
    assert spec
    assert spec.loader
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    assert other._LANES != low_rank._LANES
    left, right = numbers(37, 5, dtype=torch.float32).numpy(), numbers(5, 615, dtype=torch.float32).numpy()
    for start, columns in ((0, 615), (100, 515), (3, 77), (614, 1)):
        ours, theirs = (np.empty((37, columns), np.float32) for _ in range(2))
        low_rank.product(left, right, start, ours, 0.5)
        other.product(left, right, start, theirs, 0.5)
        assert np.array_equal(ours, theirs)
