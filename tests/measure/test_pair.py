"""What `inspect --measure` counts, against a few lines of torch over whole tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expo_serve import kernels
from expo_serve.config import ExpoConfig
from expo_serve.errors import CheckpointError
from expo_serve.load import sizes
from expo_serve.measure.groups import group_of, layer_of
from expo_serve.measure.measurement import MeasuredPart, Measurement
from expo_serve.measure.pair import measure_plan
from expo_serve.measure.verdict import LARGE_STEP, UNRELATED_STEP, judge
from expo_serve.plan.prepare import prepare
from expo_serve.progress import Progress
from tests.models.adapters import factors, write_adapter
from tests.models.raw import tiny_tensors, write_raw
from tests.models.reference import extrapolate

Tensors = dict[str, torch.Tensor]
UNCHANGED = "model.layers.0.mlp.up_proj.weight"


def steps(dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """A pair of tiny steps: most values are some units apart, one tensor not at all."""
    base = tiny_tensors(1, dtype=dtype, hidden=40, vocabulary=77)
    generator = torch.Generator().manual_seed(3)
    aligned = {
        name: (t.float() * (1 + 0.01 * torch.randn(t.shape, generator=generator))).to(dtype) for name, t in base.items()
    }
    aligned[UNCHANGED] = base[UNCHANGED].clone()
    return base, aligned


def measured(base: Path, alpha: float = 0.3, **other: Any) -> Measurement:
    """All values of two folders."""
    config = ExpoConfig(base=str(base), alpha=alpha, **other)
    return measure_plan(prepare(config), config, Progress("", 0, on_terminal=False, is_shown=False))


def reference(base: Tensors, aligned: Tensors, alpha: float) -> dict[str, Any]:
    """The same, tensor by tensor."""
    step = torch.cat([(aligned[name].double() - base[name].double()).flatten() for name in base])
    after = torch.cat([tensor.double().flatten() for tensor in aligned.values()])
    moved = {}
    for method in ("nearest", "dithered"):
        results = [extrapolate(base[n], aligned[n], alpha, n if method == "dithered" else None) for n in base]
        moved[method] = torch.cat([result.double().flatten() for result in results]) - after
    return {
        "unchanged": float((step == 0).double().mean()),
        "step": float(step.norm() / after.norm()),
        "effective": {method: float(found @ step / (step @ step)) for method, found in moved.items()},
    }


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_are_those_of_a_few_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, loops: bool
) -> None:
    monkeypatch.setattr(sizes, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(sizes, "MEASURED_PIECE_BYTES", 1000)
    monkeypatch.setattr(sizes, "STREAM_PIECE_BYTES", 1000)
    if not loops:
        monkeypatch.setattr(kernels, "available", lambda *names: False)
    base, aligned = steps(dtype)
    found = measured(write_raw(tmp_path / "base", base), aligned=str(write_raw(tmp_path / "aligned", aligned)))
    expected = reference(base, aligned, 0.3)
    assert found.total.share_unchanged == pytest.approx(expected["unchanged"])
    assert found.total.step == pytest.approx(expected["step"], rel=1e-5)
    assert found.effective_alpha == pytest.approx(expected["effective"], rel=1e-4)
    assert found.effective_alphas == {"0.3": found.effective_alpha}
    assert found.total.values == sum(tensor.numel() for tensor in base.values())
    assert sum(found.total.units.values()) + found.total.share_unchanged == pytest.approx(1)


@pytest.mark.parametrize("loops", [True, False])
def test_units_in_the_last_place_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loops: bool) -> None:
    if not loops:
        monkeypatch.setattr(kernels, "available", lambda *names: False)
    base = tiny_tensors(1)
    aligned = {name: tensor.clone() for name, tensor in base.items()}
    for name in base:
        for place, units in enumerate((1, -1, 2, 3, -4, 5, 9)):
            aligned[name].view(-1).view(torch.int16)[place] += units
    zeros = base["model.embed_tokens.weight"].view(-1), aligned["model.embed_tokens.weight"].view(-1)
    zeros[0][9], zeros[1][9] = 0.0, -0.0
    found = measured(write_raw(tmp_path / "base", base), aligned=str(write_raw(tmp_path / "aligned", aligned)))
    values, tensors = found.total.values, len(base)
    counts = {units: round(share * values / tensors) for units, share in found.total.units.items()}
    assert counts == {"1": 2, "2": 1, "3-4": 2, "more": 2}


def test_groups_and_layers_add_up(tmp_path: Path) -> None:
    base, aligned = steps(torch.bfloat16)
    found = measured(write_raw(tmp_path / "base", base), aligned=str(write_raw(tmp_path / "aligned", aligned)))
    assert sum(group.values for group in found.groups) == found.total.values
    assert sum(group.tensors for group in found.groups) == found.total.tensors == len(base)
    assert {group.group for group in found.groups} >= {"embeddings", "attention", "mlp", "norms"}
    assert [layer.layer for layer in found.layers] == [0, 1]


def test_alpha_of_a_rule_is_measured_apart(tmp_path: Path) -> None:
    base, aligned = steps(torch.bfloat16)
    folders = write_raw(tmp_path / "base", base), write_raw(tmp_path / "aligned", aligned)
    found = measured(folders[0], aligned=str(folders[1]), alpha_rules=("mlp=1", "norm=0"))
    assert set(found.effective_alphas) == {"0.3", "1", "0"}
    assert found.effective_alphas["0"] == {"nearest": 0, "dithered": 0}
    assert found.effective_alphas["1"]["dithered"] == pytest.approx(1, rel=0.1)
    assert found.effective_alpha == found.effective_alphas["0.3"]


def test_nothing_changed(tmp_path: Path) -> None:
    folders = [write_raw(tmp_path / side, tiny_tensors(1)) for side in ("base", "aligned")]
    found = measured(folders[0], aligned=str(folders[1]))
    assert found.effective_alpha == {"nearest": None, "dithered": None}
    assert found.verdict.kind == "same"


def test_adapter_is_measured_by_its_own_step(tmp_path: Path) -> None:
    base = tiny_tensors(1)
    name = "model.layers.0.mlp.up_proj.weight"
    outputs, inputs = base[name].shape
    adapter = factors(name.removesuffix(".weight"), outputs, inputs, spread=0.05)
    delta = write_adapter(tmp_path / "delta", adapter, r=2, lora_alpha=2)
    found = measured(write_raw(tmp_path / "base", base), delta=str(delta))
    a, b = (next(t for key, t in adapter.items() if f"lora_{part}" in key) for part in "AB")
    step = b @ a
    assert found.total.tensors == 1
    assert found.total.step == pytest.approx(float(step.norm() / (base[name].float() + step).norm()), rel=1e-3)
    assert found.effective_alpha["dithered"] == pytest.approx(0.3, abs=0.15)


def test_file_that_was_cut_is_an_error(tmp_path: Path) -> None:
    base, aligned = steps(torch.bfloat16)
    folders = write_raw(tmp_path / "base", base), write_raw(tmp_path / "aligned", aligned)
    config = ExpoConfig(base=str(folders[0]), aligned=str(folders[1]), alpha=0.3)
    plan = prepare(config)
    file = folders[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="has become shorter"):
        measure_plan(plan, config, Progress("", 0, on_terminal=False, is_shown=False))


def part(step: float | None, unchanged: float = 0.5) -> MeasuredPart:
    return MeasuredPart(
        tensors=1,
        values=1,
        share_unchanged=unchanged,
        units={},
        step=step,
        effective_alpha={"nearest": 0, "dithered": 0},
    )


@pytest.mark.parametrize(
    ("total", "learned_to_talk", "kind"),
    [
        (part(0.0, 1.0), False, "same"),
        (part(0.001), False, "alignment"),
        (part(0.001), True, "retrained"),
        (part(LARGE_STEP), False, "retrained"),
        (part(UNRELATED_STEP), False, "unrelated"),
        (part(1.4), True, "unrelated"),
    ],
)
def test_verdict(total: MeasuredPart, learned_to_talk: bool, kind: str) -> None:
    verdict = judge(total, learned_to_talk=learned_to_talk)
    assert verdict.kind == kind
    assert kind == "same" or f"{total.step:.2g}" in verdict.text


@pytest.mark.parametrize(
    ("name", "group", "layer"),
    [
        ("model.embed_tokens.weight", "embeddings", None),
        ("lm_head.weight", "head", None),
        ("model.norm.weight", "norms", None),
        ("model.layers.3.input_layernorm.weight", "norms", 3),
        ("model.layers.11.self_attn.q_proj.weight", "attention", 11),
        ("model.layers.0.self_attn.q_norm.weight", "norms", 0),
        ("model.layers.2.mlp.experts.7.up_proj.weight", "experts", 2),
        ("model.layers.2.block_sparse_moe.experts.7.w1.weight", "experts", 2),
        ("model.layers.2.mlp.gate_proj.weight", "mlp", 2),
        ("transformer.h.4.attn.c_attn.weight", "attention", 4),
        ("transformer.h.4.mlp.c_fc.weight", "mlp", 4),
        ("transformer.h.4.ln_1.weight", "norms", 4),
        ("model.layers.5.mixer.in_proj.weight", "attention", 5),
        ("vision_tower.patch.weight", "other", None),
    ],
)
def test_group_and_layer_of_a_name(name: str, group: str, layer: int | None) -> None:
    from expo_serve.checkpoint.records import TensorRecord

    assert group_of(TensorRecord(name, Path(), 0, "BF16", (2, 2))) == group
    assert layer_of(name) == layer
