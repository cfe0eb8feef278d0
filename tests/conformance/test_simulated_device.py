"""Every family onto a simulated device: late, in any order that is allowed, with tiny turns; and with odd defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expo_serve.vllm_plugin import loader
from tests.compare import by_expo, differing
from tests.conformance.checkpoints import write_pair
from tests.conformance.families import FAMILIES
from tests.conformance.family import Family
from tests.conformance.running import load
from tests.load.simulator import Simulator
from tests.models import reference_checkpoint
from tests.simulated import onto

ALPHA = 0.5
QUICK = {
    "BloomForCausalLM",
    "DeepseekV3ForCausalLM",
    "GPT2LMHeadModel",
    "GptOssForCausalLM",
    "LlamaForCausalLM",
    "MixtralForCausalLM",
}
pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("engines")]


def given(family: Family) -> dict[str, Any]:
    """Arguments of its load."""
    return {"trust_remote_code": True, **family.engine}


@pytest.mark.parametrize(
    "family",
    [pytest.param(one, id=one.name, marks=() if one.name in QUICK else pytest.mark.slow) for one in FAMILIES],
)
def test_family_onto_a_device(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, aligned = write_pair(tmp_path, family)
    plain = load(reference_checkpoint(base, aligned, ALPHA, tmp_path / "merged"), **given(family))
    for seed in (None, 7):
        simulator = Simulator(seed)
        with onto(simulator, monkeypatch):
            found = load(aligned, **given(family), **by_expo(base, ALPHA))
        assert "upload" in simulator.calls
        assert differing(found.state, plain.state, family.unfilled) == []


@pytest.mark.parametrize("family", [one for one in FAMILIES if one.name in QUICK], ids=lambda family: family.name)
def test_another_default_device_changes_nothing(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sets one must not find our buffers there."""
    base, aligned = write_pair(tmp_path, family)
    plain = load(reference_checkpoint(base, aligned, ALPHA, tmp_path / "merged"), **given(family))
    load_weights = loader.ExpoModelLoader._load_lazily

    def on_meta(*arguments: Any) -> Any:
        with torch.device("meta"):
            return load_weights(*arguments)

    monkeypatch.setattr(loader.ExpoModelLoader, "_load_lazily", on_meta)
    found = load(aligned, **given(family), **by_expo(base, ALPHA))
    assert differing(found.state, plain.state, family.unfilled) == []
