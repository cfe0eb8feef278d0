"""What most often means a wrong model is refused by every command, unless it is allowed by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expo_serve.config import ExpoConfig
from expo_serve.errors import LoadError, PairError
from expo_serve.plan.prepare import prepare
from expo_serve.report import LoadReport, PublicSource
from expo_serve.vllm_plugin.endpoints import _refuse_different_sources
from tests.command import refused, run_here
from tests.models.adapters import factors, write_adapter
from tests.models.raw import tiny_tensors, write_pair, write_raw

Sides = Callable[[Path], list[str]]
NORM = "model.layers.0.input_layernorm.weight"


def _same(folder: Path) -> list[str]:
    base = str(write_pair(folder)[0])
    return ["--base", base, "--aligned", base]


def _same_by_link(folder: Path) -> list[str]:
    base = write_pair(folder)[0]
    (folder / "link").symlink_to(base)
    return ["--base", str(base), "--aligned", str(folder / "link")]


def _other_base(folder: Path) -> list[str]:
    adapter = write_adapter(
        folder / "adapter", factors("model.layers.0.self_attn.q_proj", 8, 8), base_model_name_or_path="org/other-7b"
    )
    return ["--base", str(write_raw(folder / "base")), "--delta", str(adapter)]


def _whole(folder: Path) -> list[str]:
    sides = [{**tiny_tensors(seed), NORM: torch.full((8,), 1.0 + seed / 10).bfloat16()} for seed in (0, 1)]
    for side in sides:
        side.update({name: torch.ones(8).bfloat16() for name in side if name.endswith("layernorm.weight")})
    base, delta = (str(write_raw(folder / name, side)) for name, side in zip(("base", "delta"), sides, strict=True))
    return ["--base", base, "--delta", delta]


DOUBTS: dict[str, tuple[str, Sides]] = {
    "the same folder": ("same-sources", _same),
    "the same folder by a link": ("same-sources", _same_by_link),
    "an adapter of another base": ("other-base", _other_base),
    "a whole checkpoint as a delta": ("whole-checkpoint", _whole),
}


@pytest.mark.parametrize(("name", "sides"), DOUBTS.values(), ids=DOUBTS)
def test_doubt_is_refused_unless_it_is_allowed(name: str, sides: Sides, tmp_path: Path) -> None:
    flags = [*sides(tmp_path), "--alpha", "0.5"]
    words = (f"(if this is meant: --allow {name})",)
    out = tmp_path / "out"
    refused(*flags, words=words)
    refused("inspect", *flags, words=words)
    refused("merge", *flags, "--out", str(out), words=words)
    other = "same-sources" if name == "other-base" else "other-base"
    refused("merge", *flags, "--out", str(out), "--allow", other, words=words)
    assert not out.exists()
    allowed = ["--allow", other, "--allow", name]
    inspected = run_here("inspect", *flags, *allowed, "--json")
    found = json.loads(inspected.stdout)
    assert (inspected.returncode, found["refusals"], found["allowed"]) == (0, [], [other, name])
    assert any(f"(allowed: {name})" in warning for warning in found["warnings"])
    merged = run_here("merge", *flags, *allowed, "--out", str(out))
    assert merged.returncode == 0, merged.stderr
    assert f"(allowed: {name})" in merged.stderr


@pytest.mark.parametrize("name", ["other-base", "whole-checkpoint"])
def test_deltas_are_not_applied_in_doubt(name: str, tmp_path: Path) -> None:
    sides = dict(DOUBTS.values())[name](tmp_path)
    flags = ["delta", "apply", *sides, "--out", str(tmp_path / "out")]
    refused(*flags, words=(f"--allow {name}",))
    assert run_here(*flags, "--allow", name).returncode == 0


def test_delta_of_the_same_files_is_not_created_in_doubt(tmp_path: Path) -> None:
    flags = ["delta", "create", *_same(tmp_path), "--out", str(tmp_path / "out")]
    refused(*flags, words=("--allow same-sources",))
    assert run_here(*flags, "--allow", "same-sources").returncode == 0


def test_key_of_plain_vllm(tmp_path: Path) -> None:
    base = str(write_pair(tmp_path)[0])
    with pytest.raises(PairError, match="same-sources"):
        prepare(ExpoConfig(base=base, aligned=base, alpha=0.5))
    for allow in ("same-sources", ["same-sources"]):
        config = ExpoConfig.model_validate({"base": base, "aligned": base, "alpha": 0.5, "allow": allow})
        assert prepare(config).doubts == ()


def test_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    flags = [*_same(tmp_path), "--alpha", "0.5", "--allow", "everything"]
    refused("inspect", *flags, words=("--allow", "'other-base'", "'same-sources'", "found 'everything'"))


@pytest.mark.parametrize(
    "name", ["Other-7B", "someone/other-7b", "org/other-7b-bnb-4bit", "org/other-7b-unsloth-bnb-4bit"]
)
def test_names_of_one_base(name: str, tmp_path: Path) -> None:
    """As the folder's own config names it."""
    module = "model.layers.0.self_attn.q_proj"
    adapter = write_adapter(tmp_path / "adapter", factors(module, 8, 8), base_model_name_or_path=name)
    base = write_raw(tmp_path / "base", _name_or_path="org/other-7b")
    assert prepare(ExpoConfig(base=str(base), delta=str(adapter), alpha=0.5)).doubts == ()


def rank(number: int, revision: str) -> LoadReport:
    """A report of a rank that found this version of base."""
    source = PublicSource(name="org/base", revision=revision, fingerprint="f")
    return LoadReport.model_construct(rank=number, engine=0, sources={"base": source})


def test_ranks_with_other_versions_are_refused() -> None:
    config = ExpoConfig(base="b", alpha=0.5)
    _refuse_different_sources([rank(0, "one"), rank(1, "one")], config)
    with pytest.raises(LoadError, match=r"base differs between the ranks: org/base one .* org/base two .* on rank 1"):
        _refuse_different_sources([rank(0, "one"), rank(1, "two")], config)
    allowed = ExpoConfig(base="b", alpha=0.5, allow=("different-revisions",))
    _refuse_different_sources([rank(0, "one"), rank(1, "two")], allowed)
