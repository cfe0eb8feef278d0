"""Checkpoints as people report to have them: saved by ZeRO-3 and FSDP, with other layers, heads, or settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command import refused, run_here
from tests.models.raw import same_bits, tiny_tensors, write_pair, write_raw
from tests.models.reference import read_tensors, reference_tensors

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"
Tensors = Mapping[str, torch.Tensor]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A pair that would be served."""
    return write_pair(tmp_path)


def sides(base: Path, aligned: Path, *more: str) -> tuple[str, ...]:
    return ("--base", str(base), "--aligned", str(aligned), "--alpha", "0.5", *more)


def warnings_of(base: Path, aligned: Path, out: Path) -> str:
    """What a merge that succeeds prints."""
    result = run_here("merge", *sides(base, aligned), "--out", str(out))
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.mark.parametrize("unmatched", ["refuse", "copy"])
@pytest.mark.parametrize("empty_side", ["base", "aligned"])
def test_parameters_that_zero3_did_not_gather(tmp_path: Path, unmatched: str, empty_side: str) -> None:
    tensors = {name: torch.zeros(0).bfloat16() if "layers" in name else t for name, t in tiny_tensors().items()}
    full, empty = write_raw(tmp_path / "full"), write_raw(tmp_path / "empty", tensors)
    base, aligned = (empty, full) if empty_side == "base" else (full, empty)
    words = (f"{empty_side} (empty) holds 6 tensors without values", " [0]: ", "zero_to_fp32.py")
    refused("inspect", *sides(base, aligned, "--unmatched", unmatched), words=words)


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_of_training_inside_of_names(pair: tuple[Path, Path], wrapper: str, tmp_path: Path) -> None:
    tensors = read_tensors(pair[1])
    wrapped = {f"{wrapper}.{name}".replace("layers.0.", f"layers.0.{wrapper}."): t for name, t in tensors.items()}
    warnings_of(pair[0], write_raw(tmp_path / "wrapped", wrapped), tmp_path / "out")
    found, expected = read_tensors(tmp_path / "out"), reference_tensors(*pair, 0.5)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


@pytest.mark.parametrize("unmatched", ["refuse", "copy"])
def test_flattened_parameters_of_fsdp(pair: tuple[Path, Path], unmatched: str, tmp_path: Path) -> None:
    flat = write_raw(tmp_path / "flat", {"_fsdp_wrapped_module._flat_param": torch.ones(99)})
    words = ("aligned (flat) holds flattened parameters of FSDP", "_flat_param", "full state dict")
    refused("inspect", *sides(pair[0], flat, "--unmatched", unmatched), words=words)


@pytest.mark.parametrize("unmatched", ["refuse", "copy"])
@pytest.mark.parametrize("layers", [1, 3])
def test_layers_put_in_or_taken_out(pair: tuple[Path, Path], layers: int, unmatched: str, tmp_path: Path) -> None:
    other = write_raw(tmp_path / "other", tiny_tensors(layers=layers), num_hidden_layers=layers)
    words = ("3 tensors are in one checkpoint only", f"where 2 became {layers}", "passthrough")
    printed = refused("inspect", *sides(pair[0], other, "--unmatched", unmatched), words=words)
    assert "--unmatched copy" not in printed


@pytest.mark.parametrize("key", ["num_attention_heads", "num_key_value_heads", "head_dim"])
def test_other_heads_in_weights_of_one_shape(key: str, tmp_path: Path) -> None:
    configs: list[dict[str, Any]] = [{key: size} for size in (2, 4)]
    base, aligned = (write_raw(tmp_path / str(n), tiny_tensors(n), **config) for n, config in enumerate(configs))
    words = ("attention has other heads", f"{key} is 2 in base and 4 in aligned")
    refused("inspect", *sides(base, aligned), words=words)


def test_heads_that_one_config_leaves_out(tmp_path: Path) -> None:
    base = write_raw(tmp_path / "base", tiny_tensors(), num_attention_heads=2)
    aligned = write_raw(tmp_path / "aligned", tiny_tensors(1), num_attention_heads=2, num_key_value_heads=2, head_dim=4)
    assert "configs differ" not in warnings_of(base, aligned, tmp_path / "out")


YARN = {"rope_type": "yarn", "factor": 4.0}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "other base of the angles": ({"rope_theta": 10000.0}, {"rope_theta": 500000.0}, "rope_theta is 10000.0 in base"),
    "of two versions of transformers": (
        {"rope_theta": 10000.0},
        {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
        "rope_theta is 10000.0 in base and 500000.0 in aligned",
    ),
    "longer context": ({"rope_scaling": None}, {"rope_scaling": YARN}, "rope type is default in base and yarn"),
    "other factor": ({"rope_scaling": YARN}, {"rope_scaling": {**YARN, "factor": 8.0}}, "factor is 4.0 in base"),
    "of the language part": (
        {"text_config": {"rope_theta": 1e4}},
        {"text_config": {"rope_theta": 1e6}},
        "rope_theta is 10000.0 in base",
    ),
    "other activation": ({"hidden_act": "silu"}, {"hidden_act": "gelu"}, "hidden_act is silu in base and gelu"),
}
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "written by two versions": (
        {"rope_theta": 10000, "rope_scaling": YARN},
        {"rope_parameters": {**YARN, "rope_theta": 10000.0}},
    ),
    "older names": ({"rope_scaling": {"type": "mrope"}}, {"rope_parameters": {"rope_type": "default"}}),
    "left to the default": ({"rope_theta": 10000.0}, {}),
    "one for each type of layer": (
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}},
    ),
}


@pytest.mark.parametrize(("ours", "theirs", "found"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_differ_are_warned_of(
    ours: dict[str, Any], theirs: dict[str, Any], found: str, tmp_path: Path
) -> None:
    base = write_raw(tmp_path / "base", tiny_tensors(), **ours)
    aligned = write_raw(tmp_path / "aligned", tiny_tensors(1), **theirs)
    printed = warnings_of(base, aligned, tmp_path / "out")
    assert "the configs differ in what the weights mean" in printed
    assert found in printed


@pytest.mark.parametrize(("ours", "theirs"), SAME.values(), ids=SAME)
def test_settings_written_otherwise_are_the_same(ours: dict[str, Any], theirs: dict[str, Any], tmp_path: Path) -> None:
    base = write_raw(tmp_path / "base", tiny_tensors(), **ours)
    aligned = write_raw(tmp_path / "aligned", tiny_tensors(1), **theirs)
    assert "configs differ" not in warnings_of(base, aligned, tmp_path / "out")


def test_copy_of_base_in_place_of_aligned(tmp_path: Path) -> None:
    base, copy = write_raw(tmp_path / "base"), write_raw(tmp_path / "copy")
    assert "the first values of all tensors are the same" in warnings_of(base, copy, tmp_path / "out")


def test_one_tensor_that_differs_is_enough(tmp_path: Path) -> None:
    base = write_raw(tmp_path / "base")
    aligned = write_raw(tmp_path / "aligned", {**tiny_tensors(), NORM: torch.ones(8).bfloat16()})
    assert "values of all tensors" not in warnings_of(base, aligned, tmp_path / "out")


@pytest.mark.parametrize(("tied", "is_other"), [(True, True), (True, False), (False, True), (None, True)])
def test_trained_output_beside_a_tied_embedding(tied: bool | None, is_other: bool, tmp_path: Path) -> None:
    tensors = tiny_tensors(1)
    tensors[HEAD] = tiny_tensors(2)[HEAD] if is_other else tensors[EMBED].clone()
    base = write_raw(tmp_path / "base", tiny_tensors(), tie_word_embeddings=tied)
    aligned = write_raw(tmp_path / "aligned", tensors, tie_word_embeddings=tied)
    found = "stores another output (lm_head.weight)" in warnings_of(base, aligned, tmp_path / "out")
    assert found == (tied is True and is_other)
