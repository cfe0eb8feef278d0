"""The load tests still run: each is imported, takes the flags of ``make bench``, and measures a tiny pair."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import loadtests
from expo_serve import kernels
from expo_serve.config import ExpoConfig
from expo_serve.errors import ValuesError
from expo_serve.plan.plan import Plan
from expo_serve.plan.prepare import prepare
from loadtests import answers, bench, check_cost, growth, machine, pairs, results, summary
from tests.models.raw import tiny_tensors, write_raw

MODULES = sorted(file.stem for file in Path(loadtests.__file__).parent.glob("*.py") if file.stem != "__init__")
STEPS = {
    f"{name} {size}{mode}": (name, ["--size", size, *arguments])
    for mode, steps in ((" quick", bench._QUICK), ("", bench._FULL))
    for size, scripts in steps.items()
    for name, *arguments in scripts
}
TINY = {"layers": 2, "hidden": 64, "intermediate": 128, "heads": 8, "kv_heads": 4, "tied": False}
pytestmark = pytest.mark.usefixtures("demo_pair")  # its tokenizer goes with every pair


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Some of them set variables when they are imported."""
    with mock.patch.dict(os.environ):
        yield


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.engine if name == "vllm_bench" else ()) for name in MODULES]
)
def test_it_is_imported(name: str) -> None:
    assert importlib.import_module(f"loadtests.{name}").__doc__


class _Parsed(Exception):
    pass


@pytest.mark.parametrize(("name", "arguments"), STEPS.values(), ids=STEPS)
def test_bench_gives_it_flags_that_it_has(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(*given: Any) -> None:
        raise _Parsed(parse_args(*given))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--work", str(tmp_path), "--results", str(tmp_path)])
    with pytest.raises(_Parsed):
        importlib.import_module(f"loadtests.{name}").main()
    assert name in summary.SCRIPTS


def measured(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """Run a script on a pair of some megabytes; returns the figures that it kept."""
    monkeypatch.setitem(pairs._SHAPES, "tiny", TINY)
    places = ["--work", str(folder / "work"), "--results", str(folder / "results")]
    monkeypatch.setattr(sys, "argv", [name, "--size", "tiny", *arguments, *places])
    importlib.import_module(f"loadtests.{name}").main()
    figures: dict[str, Any] = results.read(name, folder / "results")["tiny"]
    assert figures["machine"]
    return figures


def test_cost_of_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = measured("check_cost", tmp_path, monkeypatch, "--rounds", "1")
    assert min(series["median"] for series in figures["seconds"].values()) > 0
    assert figures["checked_over_unchecked"].keys() == {"compiled", "torch"}


def test_ways_with_the_check_notice_what_is_not_finite_and_the_others_do_not(tmp_path: Path) -> None:
    """Else ``check_cost`` would compare a way with itself."""
    sides = []
    for seed, side in enumerate(("base", "aligned")):
        tensors = tiny_tensors(seed)
        tensors["lm_head.weight"][2, 1] = torch.nan
        sides.append(str(write_raw(tmp_path / side, tensors)))
    plan = prepare(ExpoConfig(base=sides[0], aligned=sides[1], alpha=0.5, rounding="nearest"))
    noticed = {name: _notices(plan, way) for name, way in check_cost.ways().items()}
    assert noticed == {"compiled": True, "compiled, unchecked": False, "torch": True, "torch, unchecked": False}
    with check_cost.ways()["torch"]():
        assert not kernels.available()


def _notices(plan: Plan, way: Callable[[], AbstractContextManager[Any]]) -> bool:
    model = torch.nn.Module()
    for name, planned in plan.tensors.items():
        values = torch.zeros(planned.aligned.shape, dtype=torch.bfloat16)
        model.register_parameter(name.replace(".", "-"), torch.nn.Parameter(values, requires_grad=False))
    try:
        with way():
            check_cost.load(plan, model)
    except ValuesError:
        return True
    return False


def test_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "QUICK", {"version": (["--version"], 0)})
    figures = measured("answers", tmp_path, monkeypatch, "--rounds", "1")
    assert len(figures["seconds"]["version"]["all"]) == 1
    monkeypatch.setattr(answers, "QUICK", {"version": (["--version"], 2)})
    with pytest.raises(RuntimeError, match="version: exit code 0, expected 2"):
        measured("answers", tmp_path, monkeypatch, "--rounds", "1")


def test_machine_is_described_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    described = machine.describe()
    assert described["commit"] == ""
    assert described["versions"]["torch"] == torch.__version__


def test_growth_and_summary_of_the_figures_that_are_kept(tmp_path: Path) -> None:
    assert growth.growth(results.read("load_time", results.RESULTS))["expo"]["excess"] > 0
    shown = summary.summary(results.RESULTS, summary.MAIN_SIZE)
    assert "# Figures against their bars" in shown
    assert "load of the pair, warm" in shown
    assert summary.write(tmp_path, summary.MAIN_SIZE) == "Nothing was measured yet."


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("load_time", ["--rounds", "1", "--cold-rounds", "1"]),
        ("delta_load", ["--rounds", "1", "--cold-rounds", "0"]),
        ("fresh_load", ["--rounds", "1"]),
        ("ranks", []),
    ],
)
def test_load_by_vllm(name: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(name, tmp_path, monkeypatch, *arguments)
