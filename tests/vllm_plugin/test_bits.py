"""Every parameter, bit for bit: expo against plain vLLM on the reference's checkpoint, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expo_serve.report import LoadReport
from tests import compare
from tests.compare import assert_not_loaded, by_expo, differing, load
from tests.models import build_pair, reference_checkpoint

pytestmark = pytest.mark.engine
ALPHAS = (-1, 0, 0.5, 1.7)


def assert_same_bits(base: Path, aligned: Path, alpha: float, scratch: Path, **arguments: Any) -> LoadReport:
    """Load both ways and compare; returns expo's report."""
    merged = reference_checkpoint(base, aligned, alpha, scratch / f"merged-{alpha}")
    return compare.assert_same_bits(merged, aligned, by_expo(base, alpha), **arguments)


@pytest.mark.parametrize("alpha", [0.5, *(pytest.param(alpha, marks=pytest.mark.slow) for alpha in (-1, 0, 1.7))])
def test_demo_pair(demo_pair: tuple[Path, Path], alpha: float, tmp_path: Path) -> None:
    report = assert_same_bits(*demo_pair, alpha, tmp_path)
    assert report.effective_alpha == pytest.approx(alpha, rel=0.02)
    size = (demo_pair[1] / "model.safetensors").stat().st_size
    assert report.tensors == {"extrapolated": 272, "materialized": 0, "copied": 0}
    for side, unread in (("base", 0), ("aligned", -1)):
        assert report.read_bytes[side] == pytest.approx(0 if alpha == unread else size, rel=1e-3)


@pytest.mark.slow
def test_demo_pair_rounded_to_nearest(demo_pair: tuple[Path, Path], tmp_path: Path) -> None:
    merged = reference_checkpoint(*demo_pair, 0.5, tmp_path / "merged", rounding="nearest")
    report = compare.assert_same_bits(merged, demo_pair[1], by_expo(demo_pair[0], 0.5, rounding="nearest"))
    assert report.effective_alpha is not None
    assert report.effective_alpha == pytest.approx(0.61, abs=0.03)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.usefixtures("destination")
def test_served_in_another_dtype(dtype: str, tmp_path: Path) -> None:
    assert_same_bits(*build_pair(tmp_path), 0.5, tmp_path, dtype=dtype)


@pytest.mark.usefixtures("destination")
def test_base_in_fp32_and_other_shards(tmp_path: Path) -> None:
    base, aligned = build_pair(tmp_path, base_dtype=torch.float32, base_shard_size="60KB", aligned_shard_size="100KB")
    assert len(list(base.glob("*.safetensors"))) != len(list(aligned.glob("*.safetensors"))) > 1
    for alpha in ALPHAS:
        assert_same_bits(base, aligned, alpha, tmp_path)


@pytest.mark.usefixtures("destination")
def test_planted_values(tmp_path: Path) -> None:
    base, aligned = build_pair(tmp_path)
    largest = torch.finfo(torch.bfloat16).max
    planted = torch.tensor([-0.0, 0.0, -0.0, 0.0, largest, -largest, 1e-40, largest], dtype=torch.bfloat16)
    beside = torch.tensor([-0.0, -0.0, 0.0, 0.0, largest, -largest, -1e-40, largest], dtype=torch.bfloat16)
    for folder, values in ((base, planted), (aligned, beside)):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.mlp.down_proj.weight"][0, :8] = values
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for alpha in ALPHAS:
        assert_same_bits(base, aligned, alpha, tmp_path)


@pytest.mark.usefixtures("destination")
def test_grown_vocabulary(tmp_path: Path) -> None:
    base, aligned = build_pair(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (base / name).chmod(0o644)
    tensors = load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:250].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 250}))
    report = assert_same_bits(base, aligned, 0.5, tmp_path)
    assert report.grown_rows == {"model.embed_tokens.weight": 6, "lm_head.weight": 6}


def test_draft_model_loads_as_it_is(tmp_path: Path) -> None:
    base, aligned = build_pair(tmp_path / "target")
    draft, _ = build_pair(tmp_path / "draft", "llama-tied")
    expected, _ = load(draft)
    speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2}
    found, report = load(aligned, role="draft", speculative_config=speculative, **by_expo(base, 0.5))
    assert report is None
    # Once processed, a draft's output is another tensor than the embedding that it was tied to.
    assert found.keys() - expected.keys() == {"lm_head.weight (processed)"}
    assert differing({name: found[name] for name in expected}, expected) == []


@pytest.mark.usefixtures("destination")
def test_a_parameter_without_a_weight_is_an_error(tmp_path: Path) -> None:
    base, aligned = build_pair(tmp_path)
    for folder in (base, aligned):
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.self_attn.k_proj.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_not_loaded(
        aligned, by_expo(base, 0.5), r"model\.layers\.1\.self_attn\.qkv_proj\.weight: 8192 of 12288 elements"
    )


@pytest.mark.usefixtures("destination")
def test_nan_names_tensor_and_file(tmp_path: Path) -> None:
    base, aligned = build_pair(tmp_path)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert_not_loaded(
        aligned, by_expo(base, 0.5), r"'model\.norm\.weight' in .*base/model\.safetensors holds NaN or Inf"
    )


def test_unknown_key_of_the_extra_config(tmp_path: Path) -> None:
    base, aligned = build_pair(tmp_path)
    assert_not_loaded(aligned, by_expo(base, 0.5, aplha=1), "unknown key 'aplha'")
