"""Effective alpha from a sample of what a load computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expo_serve.config import Method, Rounding
from expo_serve.load.counts import Counts
from expo_serve.load.formula import combine_unchecked
from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.reader import Reader
from expo_serve.load.session import LoadSession
from expo_serve.measure.sample import Sample
from expo_serve.report import EffectiveAlpha, LoadReport, alpha_warnings, combined_effective_alpha
from tests.load.lazies import NAME, Lazies, numbers
from tests.load.rigs import all_onto_a_device


def sides(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A step of one unit in the last place in every third value."""
    base = numbers(*shape)
    bits = base.view(torch.int16).clone()
    bits.view(-1)[::3] += 1
    return base, bits.view(torch.bfloat16)


def sampled(folder: Path, alpha: float, rounding: Method, share: float = 1.0, columns: int = 1024) -> EffectiveAlpha:
    """What a sample of one copied tensor says."""
    sample = Sample(share, Rounding(rounding))
    base, aligned = sides(600, columns)
    plan = Lazies(folder).plan({NAME: base}, {NAME: aligned}, alpha, rounding)
    lazy = lazy_tensor(plan.tensors[NAME], LoadSession(Reader(), Counts(), observe=sample))
    for whole, part in zip(torch.empty(600, columns, dtype=torch.bfloat16).chunk(2, 1), lazy.chunk(2, 1), strict=True):
        whole.copy_(part)  # columns, as a row-parallel layer takes them
    return sample.effective_alpha(alpha)


@pytest.mark.parametrize(("alpha", "nearest"), [(0.3, 0.0), (0.7, 1.0), (2.0, 2.0)])
def test_over_everything_it_is_what_arrives(tmp_path: Path, alpha: float, nearest: float) -> None:
    assert sampled(tmp_path / "n", alpha, "nearest").value == pytest.approx(nearest, rel=0.01, abs=1e-3)
    found = sampled(tmp_path / "d", alpha, "dithered")
    assert found.value == pytest.approx(alpha, rel=0.02)
    assert found.standard_error == 0


def test_sample_is_near_what_it_stands_for_and_says_how_near(tmp_path: Path) -> None:
    whole = sampled(tmp_path / "whole", 0.3, "dithered")
    part = sampled(tmp_path / "part", 0.3, "dithered", share=0.3)
    assert part.value is not None
    assert whole.value is not None
    assert 0 < part.standard_error < 0.05
    assert abs(part.value - whole.value) < 5 * part.standard_error + 0.02
    assert part.step_squares == pytest.approx(whole.step_squares, rel=0.5)


@pytest.mark.parametrize("rounding", ["nearest", "dithered"])
@pytest.mark.parametrize("seed", [None, 1])
def test_on_a_device_it_is_the_same(tmp_path: Path, rounding: Method, seed: int | None) -> None:
    on_cpu = sampled(tmp_path / "cpu", 0.7, rounding, share=0.3)
    with all_onto_a_device(seed):
        found = sampled(tmp_path / "device", 0.7, rounding, share=0.3)
    assert found.value == pytest.approx(on_cpu.value, rel=1e-6)
    assert found.standard_error == pytest.approx(on_cpu.standard_error, rel=1e-3)


def test_on_a_device_it_is_what_is_in_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that computes something else is found out."""

    def combine(out: torch.Tensor, operands: Any, dtype: torch.dtype, alpha: float, noise: Any) -> torch.Tensor:
        return combine_unchecked(out, operands, dtype, 3.0, noise)

    monkeypatch.setattr("expo_serve.load.transfer.combine_unchecked", combine)
    with all_onto_a_device():
        assert sampled(tmp_path, 1.0, "nearest").value == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize("alpha", [0, -1])
def test_copied_bits_have_exactly_alpha(tmp_path: Path, alpha: float) -> None:
    assert sampled(tmp_path, alpha, "dithered").value == alpha


def test_nothing_changed_is_nothing(tmp_path: Path) -> None:
    sample = Sample(1, Rounding("dithered"))
    plan = Lazies(tmp_path).plan({NAME: numbers(4, 4)}, {NAME: numbers(4, 4)}, 0.5, "dithered")
    lazy_tensor(plan.tensors[NAME], LoadSession(observe=sample)).materialize()
    assert sample.effective_alpha(0.5).value is None


@pytest.mark.parametrize(
    ("size", "most"), [(1 << 20, 1 << 20), (256 << 20, 4 << 20), (8 << 30, 16 << 20), (1 << 40, 64 << 20)]
)
def test_size_of_a_sample_is_bounded(size: int, most: int) -> None:
    assert Sample.of_load(size, Rounding())._share * size == pytest.approx(most)


@pytest.mark.parametrize(
    ("found", "warned"),
    [
        (EffectiveAlpha(value=0.3), False),
        (EffectiveAlpha(value=0.28), False),
        (EffectiveAlpha(value=0.2), True),
        (EffectiveAlpha(value=0.2, standard_error=0.05), False),
        (EffectiveAlpha(value=None), False),
    ],
)
def test_warning_when_alpha_does_not_arrive(found: EffectiveAlpha, warned: bool) -> None:
    lines = alpha_warnings({"0.3": found}, "nearest")
    assert bool(lines) == warned
    assert not warned or ("0.2 instead of 0.3" in lines[0] and "--rounding dithered" in lines[0])


def test_ranks_are_weighted_by_their_steps() -> None:
    def rank(value: float | None, squares: float) -> LoadReport:
        found = {"0.5": EffectiveAlpha(value=value, step_squares=squares)}
        return LoadReport.model_construct(effective_alphas=found)

    assert combined_effective_alpha(0.5, [rank(0.4, 1), rank(0.6, 3), rank(None, 0)]) == pytest.approx(0.55)
    assert combined_effective_alpha(0.5, [rank(None, 0)]) is None
    assert combined_effective_alpha(0.7, [rank(0.4, 1)]) is None
