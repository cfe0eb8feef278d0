"""Weights that the two sides store in different ways: fused or split, or under other names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expo_serve.errors import PairError
from tests.plan.test_pair import Pairs, Tensors, changed
from tests.plan.test_pair_in_use import ALONE, prefixed, without_head

LAYERS = "model.layers"
LAYER = f"{LAYERS}.7"
SIZES = {"q": 8, "k": 4, "v": 4}


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    return Pairs(tmp_path)


def attention() -> tuple[Tensors, Tensors]:
    """Projections of one layer, split and fused."""
    split = {f"{LAYER}.self_attn.{name}_proj.weight": torch.zeros(size, 8) for name, size in SIZES.items()}
    return split, {f"{LAYER}.self_attn.qkv_proj.weight": torch.zeros(sum(SIZES.values()), 8)}


def attention_biases() -> tuple[Tensors, Tensors]:
    split = {f"{LAYER}.self_attn.{name}_proj.bias": torch.zeros(8) for name in "qkv"}
    return split, {f"{LAYER}.self_attn.qkv_proj.bias": torch.zeros(24)}


def mlp() -> tuple[Tensors, Tensors]:
    split = {f"{LAYER}.mlp.{name}_proj.weight": torch.zeros(12, 8) for name in ("gate", "up")}
    return split, {f"{LAYER}.mlp.gate_up_proj.weight": torch.zeros(24, 8)}


def experts(count: int = 4) -> tuple[Tensors, Tensors]:
    """With biases, whose sum is a matrix on the fused side."""
    split = {}
    for index in range(count):
        for name, shape in {"gate": (12, 8), "up": (12, 8), "down": (8, 12)}.items():
            split[f"{LAYER}.mlp.experts.{index}.{name}_proj.weight"] = torch.zeros(shape)
            split[f"{LAYER}.mlp.experts.{index}.{name}_proj.bias"] = torch.zeros(shape[0])
    fused = {
        "gate_up_proj": torch.zeros(count, 8, 24),
        "gate_up_proj_bias": torch.zeros(count, 24),
        "down_proj": torch.zeros(count, 12, 8),
        "down_proj_bias": torch.zeros(count, 8),
    }
    return split, {f"{LAYER}.mlp.experts.{name}": tensor for name, tensor in fused.items()}


def renamed() -> tuple[Tensors, Tensors]:
    return {f"{LAYER}.norm.gamma": torch.zeros(8)}, {f"{LAYER}.norm.weight": torch.zeros(8)}


LAYOUTS = {
    "attention": (attention, "self_attn", "k_proj.weight + q_proj.weight + v_proj.weight", "qkv_proj.weight"),
    "biases": (attention_biases, "self_attn", "k_proj.bias + q_proj.bias + v_proj.bias", "qkv_proj.bias"),
    "mlp": (mlp, "mlp", "gate_proj.weight + up_proj.weight", "gate_up_proj.weight"),
    "experts": (
        experts,
        "mlp.experts",
        "0.down_proj.bias + 0.down_proj.weight + 0.gate_proj.bias and 21 more",
        "down_proj + down_proj_bias + gate_up_proj and 1 more",
    ),
    "renamed": (renamed, "norm", "gamma", "weight"),
}


@pytest.mark.parametrize("unmatched", ["refuse", "copy"])
@pytest.mark.parametrize("fused_side", ["base", "aligned"])
@pytest.mark.parametrize(("make", "module", "split_names", "fused_names"), LAYOUTS.values(), ids=LAYOUTS)
def test_weights_stored_in_another_way_are_refused(
    pairs: Pairs,
    make: Callable[[], tuple[Tensors, Tensors]],
    module: str,
    split_names: str,
    fused_names: str,
    fused_side: str,
    unmatched: str,
) -> None:
    split, fused = ({**changed(), **tensors} for tensors in make())
    base, aligned = (fused, split) if fused_side == "base" else (split, fused)
    with pytest.raises(PairError, match=r"^1 module is stored differently in base and in aligned") as caught:
        pairs.plan(base, aligned, unmatched=unmatched)
    names = (fused_names, split_names) if fused_side == "base" else (split_names, fused_names)
    assert caught.value.details == (f"{LAYER}.{module}: {names[0]} in base, {names[1]} in aligned",)
    assert caught.value.details[0] in caught.value.message


def test_every_place_that_is_stored_in_another_way_is_listed(pairs: Pairs) -> None:
    layers = range(12)
    split = {f"{LAYERS}.{n}.attn.{name}.weight": torch.zeros(8, 8) for n in layers for name in "qkv"}
    split |= {f"{LAYERS}.{n}.attn.{name}.bias": torch.zeros(8) for n in layers for name in "qkv"}
    fused = {f"{LAYERS}.{n}.attn.qkv.weight": torch.zeros(24, 8) for n in layers}
    fused |= {f"{LAYERS}.{n}.attn.qkv.bias": torch.zeros(24) for n in layers}
    with pytest.raises(PairError, match=r"^12 modules are .*for example with one version of one library") as caught:
        pairs.plan({**changed(), **split}, {**changed(), **fused})
    assert len(caught.value.details) == 12
    assert caught.value.detail_lines()[10:] == ["... and 2 more"]


def test_layouts_are_compared_under_one_name_and_beside_other_tensors(pairs: Pairs) -> None:
    split, fused = attention()
    scale = {f"{LAYER}.self_attn.q_norm.weight": torch.zeros(8)}
    base = {name.removeprefix("model."): tensor for name, tensor in {**without_head(), **split}.items()}
    aligned = {**without_head(), **fused, **scale}
    with pytest.raises(PairError, match=f"the first {LAYER}.self_attn: k_proj.weight"):
        pairs.plan(base, aligned, base_config=ALONE, unmatched="copy")


def test_whole_model_under_other_names_is_refused(pairs: Pairs) -> None:
    with pytest.raises(PairError, match=r"^1 module is .* the first the model: inner.model.embed_tokens"):
        pairs.plan(prefixed("inner.", without_head()), prefixed("outer.", without_head()), unmatched="copy")
