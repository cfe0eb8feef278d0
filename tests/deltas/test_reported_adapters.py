"""Adapters and deltas as people report to have them: empty, untrained, of old versions, of other vocabularies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.command import refused, run_here
from tests.models.adapters import factors, plan_delta, write_adapter
from tests.models.raw import same_bits, tiny_tensors, write_raw
from tests.models.reference import read_tensors

MODULE = "model.layers.0.self_attn.q_proj"
NAME, EMBED, HEAD = f"{MODULE}.weight", "model.embed_tokens.weight", "lm_head.weight"
Tensors = Mapping[str, torch.Tensor]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "base")


@pytest.fixture
def adapter() -> dict[str, torch.Tensor]:
    return factors(MODULE, 8, 8)


def inspection(base: Path, delta: Path) -> tuple[str, ...]:
    return ("inspect", "--base", str(base), "--delta", str(delta), "--alpha", "0.5")


def merged(base: Path, delta: Path, out: Path) -> dict[str, torch.Tensor]:
    """The result at alpha 0.5, rounded to nearest."""
    flags = ["--base", str(base), "--delta", str(delta), "--alpha", "0.5", "--rounding", "nearest", "--out", str(out)]
    result = run_here("merge", *flags)
    assert result.returncode == 0, result.stderr
    return read_tensors(out)


def product(adapter: Tensors, scale: float) -> torch.Tensor:
    """The adapted weight at alpha 0.5, in fp32."""
    step = scale * (adapter[f"{MODULE}.lora_B.weight"] @ adapter[f"{MODULE}.lora_A.weight"])
    return tiny_tensors()[NAME].float() + 1.5 * step


@pytest.mark.parametrize("name", ["lora_A", "whole"])
def test_parameters_that_zero3_did_not_gather(base: Path, adapter: dict[str, torch.Tensor], name: str) -> None:
    empty = f"{MODULE}.lora_A.weight" if name == "lora_A" else HEAD
    folder = write_adapter(base.parent / "adapter", {**adapter, empty: torch.zeros(0)})
    refused(*inspection(base, folder), words=("1 tensor has no values", f"{empty}' [0]", "zero_to_fp32.py"))


WRAPPED = {
    "FSDP": ("_fsdp_wrapped_module.base_model.model.", "layers.0._fsdp_wrapped_module."),
    "activation checkpointing": ("base_model.model.", "layers.0._checkpoint_wrapped_module."),
    "torch.compile": ("_orig_mod.base_model.model.", "layers.0."),
    "PEFT twice": ("base_model.model.base_model.model.", "layers.0."),
}


@pytest.mark.parametrize(("prefix", "inner"), WRAPPED.values(), ids=WRAPPED)
def test_wrappers_of_training(base: Path, adapter: dict[str, torch.Tensor], prefix: str, inner: str) -> None:
    folder = write_adapter(base.parent / "adapter", adapter)
    wrapped = {prefix + name.replace("layers.0.", inner): tensor for name, tensor in adapter.items()}
    save_file(wrapped, folder / "adapter_model.safetensors")
    found = merged(base, folder, base.parent / "out")
    assert same_bits(found[NAME], product(adapter, 2).bfloat16())
    assert [name for name, tensor in tiny_tensors().items() if not same_bits(found[name], tensor)] == [NAME]


def test_adapters_name_twice(base: Path, adapter: dict[str, torch.Tensor]) -> None:
    twice = {name.replace(".weight", ".default.default.weight"): tensor for name, tensor in adapter.items()}
    found = merged(base, write_adapter(base.parent / "adapter", twice), base.parent / "out")
    assert same_bits(found[NAME], product(adapter, 2).bfloat16())


def test_factors_of_two_adapters_are_not_one_name_twice(base: Path, adapter: dict[str, torch.Tensor]) -> None:
    names = {name.replace(".weight", ".one.two.weight"): tensor for name, tensor in adapter.items()}
    folder = write_adapter(base.parent / "adapter", names)
    refused(*inspection(base, folder), words=("is a part of an adapter that is no plain sum",))


OLD: dict[str, dict[str, Any]] = {
    "before 0.3": {"enable_lora": None, "merge_weights": False, "fan_in_fan_out": False},
    "merged in evaluation": {"enable_lora": None, "merge_weights": True},
}


@pytest.mark.parametrize("config", OLD.values(), ids=OLD)
def test_configs_of_old_versions(base: Path, adapter: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    found = merged(base, write_adapter(base.parent / "adapter", adapter, **config), base.parent / "out")
    assert same_bits(found[NAME], product(adapter, 2).bfloat16())


def test_parts_of_a_fused_layer_of_old_versions(base: Path, adapter: dict[str, torch.Tensor]) -> None:
    folder = write_adapter(base.parent / "adapter", adapter, enable_lora=[True, False, True])
    refused(*inspection(base, folder), words=("not a plain sum", "enable_lora", "in groups"))


def test_alpha_left_out_is_8_as_in_peft(base: Path, adapter: dict[str, torch.Tensor]) -> None:
    folder = write_adapter(base.parent / "adapter", adapter)
    config = json.loads((folder / "adapter_config.json").read_bytes())
    del config["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert same_bits(merged(base, folder, base.parent / "out")[NAME], product(adapter, 4).bfloat16())


def test_alpha_0_for_every_module(base: Path, adapter: dict[str, torch.Tensor]) -> None:
    folder = write_adapter(base.parent / "adapter", adapter, lora_alpha=0)
    refused(*inspection(base, folder), words=("gives every module the alpha 0", "changes nothing"))


def test_alpha_0_for_one_module(base: Path, adapter: dict[str, torch.Tensor]) -> None:
    other = factors("model.layers.1.self_attn.q_proj", 8, 8)
    folder = write_adapter(
        base.parent / "adapter", {**adapter, **other}, alpha_pattern={"layers.1.self_attn.q_proj": 0}
    )
    found = merged(base, folder, base.parent / "out")
    assert [name for name, tensor in tiny_tensors().items() if not same_bits(found[name], tensor)] == [NAME]


def test_untrained_adapter_is_warned_of(base: Path, adapter: dict[str, torch.Tensor]) -> None:
    zeros = {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in adapter.items()}
    plan = plan_delta(base, write_adapter(base.parent / "zeros", zeros), 0.5)
    assert any("first values of every B" in warning for warning in plan.warnings)
    plan = plan_delta(base, write_adapter(base.parent / "adapter", adapter), 0.5)
    assert not any("first values" in warning for warning in plan.warnings)


def test_delta_of_zeros_is_warned_of(base: Path) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tiny_tensors().items()}
    plan = plan_delta(base, write_raw(base.parent / "delta", zeros), 0.5)
    assert any("first values of every tensor of the delta" in warning for warning in plan.warnings)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("is_saved", [True, False])
def test_trained_biases_that_were_not_saved_are_warned_of(
    tmp_path: Path, adapter: dict[str, torch.Tensor], bias: str, is_saved: bool
) -> None:
    base = write_raw(tmp_path / "biased", {**tiny_tensors(), f"{MODULE}.bias": torch.ones(8).bfloat16()})
    saved = {f"{MODULE}.bias": torch.full((8,), 2.0)} if is_saved else {}
    folder = write_adapter(tmp_path / "adapter", {**adapter, **saved}, bias=bias)
    plan = plan_delta(base, folder, 0.5)
    assert any("was trained with biases" in warning for warning in plan.warnings) != is_saved
    found = merged(base, folder, tmp_path / "out")[f"{MODULE}.bias"]
    assert same_bits(found, torch.full((8,), 2.5 if is_saved else 1.0).bfloat16())


def test_grouped_convolution(tmp_path: Path) -> None:
    name = "model.layers.0.mixer.conv1d"
    base = write_raw(tmp_path / "base", {**tiny_tensors(), f"{name}.weight": torch.ones(8, 1, 4).bfloat16()})
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 8, 4), f"{name}.lora_B.weight": torch.ones(8, 2, 1)}
    folder = write_adapter(tmp_path / "adapter", tensors)
    refused(*inspection(base, folder), words=("grouped convolution", f"{name}.weight [8, 1, 4]", "without this module"))


def test_vocabulary_cut_for_the_training_of_an_adapter(base: Path, adapter: dict[str, torch.Tensor]) -> None:
    folder = write_adapter(base.parent / "adapter", {**adapter, **{name: torch.ones(14, 8) for name in (EMBED, HEAD)}})
    words = ("shape or kind differs in 2 tensors", "vocabulary was cut", "14 rows, base 16", "--aligned")
    refused(*inspection(base, folder), words=words)


def test_delta_over_a_base_that_was_resized(base: Path) -> None:
    delta = {**{name: 0.01 * tensor for name, tensor in tiny_tensors(1).items()}, EMBED: torch.ones(17, 8).bfloat16()}
    folder = write_raw(base.parent / "delta", delta)
    words = ("shape or kind differs in 1 of 8 tensors", "more tokens", "17 rows, base 16", "tool that made it")
    refused(*inspection(base, folder), words=words)


def test_output_adapted_alike_with_its_embedding_is_warned_of(tmp_path: Path) -> None:
    tied = {name: tensor for name, tensor in tiny_tensors().items() if name != HEAD}
    base = write_raw(tmp_path / "base", tied, tie_word_embeddings=True)
    a, b = torch.ones(2, 16), torch.ones(8, 2)
    tensors = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    tensors |= {"lm_head.lora_A.weight": b.T.clone(), "lm_head.lora_B.weight": a.T.clone()}
    for kept_tied in (True, False):
        folder = write_adapter(tmp_path / str(kept_tied), tensors, ensure_weight_tying=kept_tied)
        plan = plan_delta(base, folder, 0.5)
        assert any("the trained model has it once" in warning for warning in plan.warnings) == kept_tied


@pytest.mark.parametrize("kept_tied", [True, False])
def test_embedding_trained_whole_alone(tmp_path: Path, adapter: dict[str, torch.Tensor], kept_tied: bool) -> None:
    tied = {name: tensor for name, tensor in tiny_tensors().items() if name != HEAD}
    base = write_raw(tmp_path / "base", tied, tie_word_embeddings=True)
    tensors = {**adapter, EMBED: tiny_tensors(1)[EMBED]}
    folder = write_adapter(tmp_path / "adapter", tensors, ensure_weight_tying=kept_tied)
    found = merged(base, folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert (HEAD in found, config["tie_word_embeddings"]) == (not kept_tied, kept_tied)
