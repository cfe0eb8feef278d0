"""One alpha after another in one engine: after each, all that it computes with is that of a fresh engine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expo_serve.errors import LoadError, ValuesError
from expo_serve.report import LoadReport
from expo_serve.vllm_plugin.worker import EXTENSION
from tests.compare import by_expo, with_extra
from tests.conformance.checkpoints import write_pair
from tests.conformance.families import FAMILIES
from tests.engines import run_engines
from tests.inprocess import vllm_model
from tests.models import build_pair
from tests.models.deltas import write_lora
from tests.models.extras import build_served_pair

pytestmark = pytest.mark.engine
FIRST, LAST = 0.5, 1.5
Answer = dict[str, Any]


def engine(model: Path, loads: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """Arguments of an engine."""
    return {"model": str(model), "enforce_eager": True, "worker_extension_cls": EXTENSION, **loads, **arguments}


def three_runs(model: Path, loads: dict[str, Any], **arguments: Any) -> list[dict[str, Any]]:
    """A fresh engine at the first alpha, one at the last, and one that goes from the first to the last."""
    last = {**loads, "model_loader_extra_config": {**loads["model_loader_extra_config"], "alpha": LAST}}
    return [
        {"llm": engine(model, loads, **arguments)},
        {"llm": engine(model, last, **arguments)},
        {"llm": engine(model, loads, **arguments), "then": [-1.0, LAST, 0.0, LAST]},
    ]


def assert_switched(first: Answer, last: Answer, switched: Answer) -> None:
    """The engine that went on has nothing of the first alpha."""
    for before, expected, found in zip(first["computed"], last["computed"], switched["computed"], strict=True):
        assert [name for name in expected if found[name] != expected[name]] == []
        assert sum(before[name] != expected[name] for name in expected) > 4
    assert switched["tokens"] == last["tokens"]
    assert [report["alpha"] for report in switched["reports"]] == [LAST] * len(last["reports"])


def build(family: str, folder: Path) -> tuple[Path, Path]:
    """A pair of a family of the conformance table."""
    (found,) = [one for one in FAMILIES if one.name == family]
    return write_pair(folder, found)


@pytest.mark.parametrize(
    "family",
    [
        "LlamaForCausalLM-tied",
        pytest.param("MixtralForCausalLM", marks=pytest.mark.slow),
        pytest.param("Qwen3NextForCausalLM", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("destination")
def test_one_process(family: str, tmp_path: Path) -> None:
    """Tied embeddings, experts and state spaces too: each keeps more than plain parameters."""
    base, aligned = build(family, tmp_path)
    runs = three_runs(aligned, by_expo(base, FIRST))
    runs += three_runs(aligned, by_expo(base, FIRST), quantization="fp8_per_channel") if "tied" in family else []
    answers = run_engines(runs)
    for start in range(0, len(answers), 3):
        assert_switched(*answers[start : start + 3])


@pytest.mark.slow
@pytest.mark.usefixtures("destination")
def test_delta(tmp_path: Path) -> None:
    base, _ = build("LlamaForCausalLM-tied", tmp_path)
    adapter = write_lora(base, tmp_path / "adapter")
    assert_switched(*run_engines(three_runs(base, with_extra({"delta": str(adapter), "alpha": FIRST}))))


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    base, aligned = build_served_pair(tmp_path, "llama")
    runs = three_runs(aligned, by_expo(base, FIRST), tensor_parallel_size=2)
    first, last, switched = run_engines(runs, VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert len(last["computed"]) == 2
    assert_switched(first, last, switched)


def reload(model: torch.nn.Module, alpha: float) -> LoadReport:
    """Load an alpha as on a GPU, into the parameters that are there, by vLLM's ``reload_weights``."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.model_loader.reload import inplace

    from expo_serve.vllm_plugin.loader import ExpoModelLoader

    config = get_current_vllm_config()
    extra = {**config.load_config.model_loader_extra_config, "alpha": alpha}
    config.load_config.model_loader_extra_config = extra
    put = partial(inplace.reload_weights, config, model, weights_path=None, is_checkpoint_format=True)
    return ExpoModelLoader(config.load_config).reload(model, config.model_config, put)


@pytest.mark.usefixtures("destination")
def test_reload_a_value_that_is_not_finite(tmp_path: Path) -> None:
    """A file that is damaged after the first load fails the next one, by name."""
    base, aligned = build_pair(tmp_path)
    with vllm_model(aligned, **by_expo(base, FIRST)) as model:
        assert reload(model, LAST).alpha == LAST
        (file,) = base.glob("*.safetensors")
        tensors = load_file(file)
        name = next(name for name in tensors if "mlp" in name)
        tensors[name][0, 0] = torch.nan
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(ValuesError, match=name):
            reload(model, 0.3)


@pytest.mark.usefixtures("destination")
def test_reload_of_other_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM itself only logs a layer that got nothing."""
    from expo_serve.vllm_plugin.loader import ExpoModelLoader

    base, aligned = build_pair(tmp_path)
    names = ExpoModelLoader._names_to_read
    with vllm_model(aligned, **by_expo(base, FIRST)) as model:
        monkeypatch.setattr(ExpoModelLoader, "_names_to_read", lambda *given: names(*given)[:-1])
        with pytest.raises(LoadError, match="1 tensor was taken by only one of the first load and the one in place"):
            reload(model, 0.3)
