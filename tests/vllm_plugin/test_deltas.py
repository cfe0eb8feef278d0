"""Base plus a delta inside vLLM: the bits of the merged checkpoint, loaded plainly, alone and on two ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from expo_serve.cli import merge
from expo_serve.config import ExpoConfig
from expo_serve.plan.prepare import pin, prepare
from tests.compare import assert_not_loaded, assert_same_bits, by_expo, with_extra
from tests.models import build_pair, read_tensors, reference_checkpoint
from tests.models.deltas import KINDS, write_delta, write_lora
from tests.rank_state import run_ranks

pytestmark = pytest.mark.engine


class Case:
    """A tiny pair with a delta, and what plain vLLM makes of its result."""

    def __init__(self, folder: Path, kind: str, family: str = "llama") -> None:
        self.base, self.aligned = build_pair(folder, family)
        self.delta = write_delta(kind, self.base, self.aligned, folder)
        self.folder, self.kind = folder, kind

    def merged(self, alpha: float) -> Path:
        """The result as a checkpoint. Of a packed delta it is the pair's, by the reference's own formula. Of the others
        our ``merge`` writes it: that proves loading and merging to be one, while the formula is proved against PEFT
        and the reference in ``tests/deltas``."""
        out = self.folder / f"merged-{alpha}"
        if self.kind == "packed":
            return reference_checkpoint(self.base, self.aligned, alpha, out)
        sources = ["--base", str(self.base), "--delta", str(self.delta)]
        assert merge.main([*sources, "--alpha", str(alpha), "--out", str(out)]) == 0
        return out

    def pinned(self, alpha: float) -> tuple[Path, dict[str, Any]]:
        """The model and the arguments of our load, as the command gives them to vLLM."""
        config = ExpoConfig(base=str(self.base), delta=str(self.delta), alpha=alpha)
        plan = prepare(config)
        extra = json.loads(pin(config, plan, None).model_dump_json(exclude_defaults=True))
        return Path(plan.model.path), with_extra(extra)


def by_delta(delta: Path) -> dict[str, Any]:
    """The arguments of a load where base is the model."""
    return with_extra({"delta": str(delta), "alpha": 0.5})


@pytest.mark.parametrize(
    ("kind", "family", "alpha"),
    [("packed", "mixtral", 0.5), ("packed", "llama-tied", 0), ("lora", "mixtral", 0.5), ("lora", "llama", 0),
     ("full", "llama", 1.7)],
)  # fmt: skip
@pytest.mark.usefixtures("destination")
def test_bits(tmp_path: Path, kind: str, family: str, alpha: float) -> None:
    case = Case(tmp_path, kind, family)
    report = assert_same_bits(case.merged(alpha), *case.pinned(alpha))
    assert set(report.read_bytes) == {"base", "delta"}
    assert report.read_bytes["delta"] > 0
    assert report.tensors["materialized"] == 0


def test_demo_pair_packed(demo_pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A real pair: small, and the pair's bits at every alpha."""
    base, aligned = demo_pair
    delta = write_delta("packed", base, aligned, tmp_path)
    checkpoint, packed = ((folder / file).stat().st_size for folder, file in
                          ((aligned, "model.safetensors"), (delta, "delta.safetensors")))  # fmt: skip
    assert packed < 0.1 * checkpoint
    for alpha in (0.5, 8):  # at -1 and 0 in tests/weights/deltas
        expected = reference_checkpoint(base, aligned, alpha, tmp_path / f"merged-{alpha}")
        report = assert_same_bits(expected, base, by_expo(base, alpha, delta=str(delta)))
        assert report.read_bytes["base"] == pytest.approx(checkpoint, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("destination")
def test_plain_vllm_with_base_as_the_model(tmp_path: Path, kind: str) -> None:
    case = Case(tmp_path, kind)
    report = assert_same_bits(case.merged(0.5), case.base, by_delta(case.delta))
    assert {side: source.name for side, source in report.sources.items()} == {"base": "base", "delta": kind}


@pytest.mark.usefixtures("destination")
def test_plain_vllm_with_the_packed_delta_as_the_model(tmp_path: Path) -> None:
    case = Case(tmp_path, "packed")
    report = assert_same_bits(case.merged(0.5), case.delta, by_expo(case.base, 0.5))
    assert set(report.sources) == {"base", "delta"}


def test_plain_vllm_whose_model_has_another_config_is_told_the_other_way(tmp_path: Path) -> None:
    case = Case(tmp_path, "packed")
    config = json.loads((case.delta / "config.json").read_text())
    (case.delta / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert_not_loaded(case.base, by_delta(case.delta), r"config differs from base's.*delta's folder as")


def with_more_rows(case: Case) -> Path:
    """The adapter with a whole embedding and output of 8 more rows each."""
    from safetensors.torch import load_file, save_file

    file = case.delta / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weight = read_tensors(case.base)[name]
        tensors[f"base_model.model.{name}"] = torch.cat([weight * 1.01, torch.ones(8, weight.shape[1]).bfloat16()])
    save_file(tensors, file)
    return case.delta


@pytest.mark.usefixtures("destination")
def test_adapter_with_a_larger_vocabulary(tmp_path: Path) -> None:
    case = Case(tmp_path, "lora")
    with_more_rows(case)
    merged = case.merged(0.5)
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == 264
    model, ours = case.pinned(0.5)
    report = assert_same_bits(merged, model, ours, hf_overrides={"vocab_size": 264})
    assert report.grown_rows == {"model.embed_tokens.weight": 8, "lm_head.weight": 8}
    assert_not_loaded(case.base, by_delta(case.delta), r"vocab_size 264.*--hf-overrides")


@pytest.mark.usefixtures("destination")
def test_a_wrong_base_is_found_while_loading(tmp_path: Path) -> None:
    case = Case(tmp_path, "packed")
    _, ours = case.pinned(0.5)
    other = build_pair(tmp_path / "other", "llama")[1]
    shutil.copy(other / "model.safetensors", case.base)
    assert_not_loaded(case.delta, ours, r"base is not the one that the delta was made against \(base\): tensor '")


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    loads: list[dict[str, Any]] = []
    for kind in KINDS:
        case = Case(tmp_path / kind, kind)
        model, ours = case.pinned(0.5)
        loads += [{"path": str(case.merged(0.5))}, {"path": str(model), **ours}]
    for answers in run_ranks(loads, tmp_path / "store"):
        for plain, expo in zip(answers[::2], answers[1::2], strict=True):
            assert expo["hashes"] == plain["hashes"]
            assert plain["hashes"]
            assert set(expo["read_bytes"]) == {"base", "delta"}


@pytest.mark.slow
def test_lora_on_two_ranks_reads_half_of_base(tmp_path: Path) -> None:
    base, _ = build_pair(tmp_path, "llama")
    load = {"path": str(base), **by_delta(write_lora(base, tmp_path / "lora"))}
    size = (base / "model.safetensors").stat().st_size
    for (answer,) in run_ranks([load], tmp_path / "store"):
        assert answer["read_bytes"]["base"] < 0.56 * size
