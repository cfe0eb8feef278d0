"""One alpha after another in one model: after each, all that the model computes with is that of a fresh load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expo_serve.errors import LoadError, ValuesError
from tests.compare import by_expo, with_extra
from tests.in_place import computed, load_alpha
from tests.inprocess import vllm_model
from tests.models import build_pair
from tests.models.deltas import write_lora
from tests.rank_state import run_ranks

pytestmark = pytest.mark.engine
ALPHAS = (0.3, 0.0, -1.0, 1.5)


def fresh(aligned: Path, alpha: float, loads: dict[str, Any], **arguments: Any) -> dict[str, str]:
    """What a model computes with that is loaded at this alpha."""
    extra = {**loads["model_loader_extra_config"], "alpha": alpha}
    with vllm_model(aligned, **with_extra(extra), **arguments) as model:
        return computed(model)


def assert_same(model: Path, loads: dict[str, Any], **arguments: Any) -> None:
    """Load alphas one after another, and compare each with a fresh load."""
    from vllm.config import get_current_vllm_config

    expected = {alpha: fresh(model, alpha, loads, **arguments) for alpha in ALPHAS}
    assert len({tuple(found.items()) for found in expected.values()}) == len(ALPHAS)
    with vllm_model(model, **loads, **arguments) as loaded:
        for alpha in (*ALPHAS, ALPHAS[0]):
            report = load_alpha(get_current_vllm_config(), loaded, alpha)
            assert report.alpha == alpha
            found = computed(loaded)
            assert [name for name in expected[alpha] if found[name] != expected[alpha][name]] == []


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "mixtral"])
def test_bits_of_a_fresh_load(family: str, tmp_path: Path) -> None:
    """Tied embeddings too: vLLM's own reload keeps the output projection packed as it was."""
    base, aligned = build_pair(tmp_path, family)
    assert_same(aligned, by_expo(base, 0.5))


def test_online_quantisation(tmp_path: Path) -> None:
    base, aligned = build_pair(tmp_path, "llama-tied")
    assert_same(aligned, by_expo(base, 0.5), quantization="fp8_per_channel")


def test_delta(tmp_path: Path) -> None:
    base, _ = build_pair(tmp_path)
    adapter = write_lora(base, tmp_path / "adapter")
    assert_same(base, with_extra({"delta": str(adapter), "alpha": 0.5}))


def test_two_ranks(tmp_path: Path) -> None:
    base, aligned = build_pair(tmp_path, "llama-tied")
    first = {"path": str(aligned), **by_expo(base, 0.5)}
    last = {"path": str(aligned), **by_expo(base, 1.5)}
    for switched, loaded in run_ranks([{**first, "then": [0.3, 1.5]}, last], tmp_path / "store"):
        assert switched["computed"] == loaded["computed"]
        assert len(loaded["computed"]) > 10


def test_a_value_that_is_not_finite(tmp_path: Path) -> None:
    """A file that is damaged after the first load fails the next one, by name."""
    from vllm.config import get_current_vllm_config

    base, aligned = build_pair(tmp_path)
    with vllm_model(aligned, **by_expo(base, 0.5)) as model:
        (file,) = base.glob("*.safetensors")
        tensors = load_file(file)
        name = next(name for name in tensors if "mlp" in name)
        tensors[name][0, 0] = torch.nan
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(ValuesError, match=name):
            load_alpha(get_current_vllm_config(), model, 0.3)


def test_other_tensors_than_the_first_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM itself only logs a layer that got nothing."""
    from vllm.config import get_current_vllm_config

    from expo_serve.vllm_plugin.loader import ExpoModelLoader

    base, aligned = build_pair(tmp_path)
    names = ExpoModelLoader._names_to_read
    with vllm_model(aligned, **by_expo(base, 0.5)) as model:
        monkeypatch.setattr(ExpoModelLoader, "_names_to_read", lambda *given: names(*given)[:-1])
        with pytest.raises(LoadError, match="1 tensor was taken by only one of the first load and the one in place"):
            load_alpha(get_current_vllm_config(), model, 0.3)
