"""Extrapolating together with what else vLLM does, in real engines: the bits that they hold, the tokens they answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.combinations import combination, covers
from tests.engines import PROMPTS, run_engines
from tests.models import reference_checkpoint
from tests.models.extras import add_mtp_head, build_served_pair, write_adapter, write_eagle_head

pytestmark = [pytest.mark.engine, pytest.mark.slow]
ALPHA = 0.5
SINGLE = (
    "another dtype",
    "quantised: fp8_per_channel",
    "draft model",
    "MTP head in the checkpoint",
    "EAGLE head",
    "runtime LoRA",
)
"""Combinations of one process each: they share one process here."""

Answer = dict[str, Any]
Executor = dict[str, Any]


class Pair:
    """A pair on disk, its merged checkpoint, and how an engine gets either."""

    def __init__(self, folder: Path, family: str) -> None:
        self.base, self.aligned = build_served_pair(folder, family)
        if family == "qwen2":
            add_mtp_head(self.base, 1)
            add_mtp_head(self.aligned, 2)
        self.merged = reference_checkpoint(self.base, self.aligned, ALPHA, folder / "merged")

    def plain(self, **llm: Any) -> Executor:
        """Plain vLLM on the merged checkpoint."""
        return {"llm": {"enforce_eager": "compilation_config" not in llm, "model": str(self.merged), **llm}}

    def expo(self, **llm: Any) -> Executor:
        """Ours on the two sides."""
        ours = {"load_format": "expo", "model_loader_extra_config": {"base": str(self.base), "alpha": ALPHA}}
        return self.plain(**{"model": str(self.aligned), **ours, **llm})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def singles(llama: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Answer, Answer]]:
    """Plain vLLM's answer and ours, by combination; alone under ``""``, and there next to aligned's own."""
    folder = tmp_path_factory.mktemp("singles")
    mimo = Pair(folder / "mimo", "qwen2")
    eagle = write_eagle_head(llama.base, folder / "eagle")
    adapter = write_adapter(llama.aligned, folder / "adapter")
    paths: dict[str, dict[str, str]] = {
        "draft model": {"speculative_config__model": str(llama.base)},
        "EAGLE head": {"speculative_config__model": str(eagle)},
    }
    runs = [llama.plain(), llama.expo()]
    for name in SINGLE:
        pair = mimo if name.startswith("MTP") else llama
        arguments = combination(name).arguments(**paths.get(name, {}))
        lora = str(adapter) if "enable_lora" in arguments else None
        runs += [{**make(**arguments), "lora": lora} for make in (pair.plain, pair.expo)]
    runs.append(llama.plain(model=str(llama.aligned)))
    answers = run_engines(runs)
    pairs = {name: (answers[2 * index], answers[2 * index + 1]) for index, name in enumerate(("", *SINGLE))}
    return {**pairs, "aligned": (answers[-1], answers[-1])}


def test_the_tokens_tell_alphas_apart(singles: dict[str, tuple[Answer, Answer]]) -> None:
    plain, expo = singles[""]
    aligned, _ = singles["aligned"]
    assert expo["tokens"] == plain["tokens"]
    assert all(one != other for one, other in zip(plain["tokens"], aligned["tokens"], strict=True))
    assert plain["hashes"] != aligned["hashes"]


def _covers_singles(function: Callable[..., None]) -> Callable[..., None]:
    for name in SINGLE:
        covers(name, "bits", "tokens")(function)
    return function


@_covers_singles
@pytest.mark.parametrize("name", SINGLE)
def test_in_one_process(singles: dict[str, tuple[Answer, Answer]], name: str) -> None:
    plain, expo = singles[name]
    assert plain["hashes"][0]
    assert expo["hashes"] == plain["hashes"]
    assert expo["tokens"] == plain["tokens"]
    (report,) = expo["reports"]
    assert report["tensors"]["extrapolated"] == singles_tensors(singles, name)
    assert report["read_bytes"]["base"] == report["read_bytes"]["aligned"] > 0


def singles_tensors(singles: dict[str, tuple[Answer, Answer]], name: str) -> int:
    """As many tensors as without the combination; MiMo's layers have three biases more."""
    alone: int = singles[""][1]["reports"][0]["tensors"]["extrapolated"]
    return alone + 3 * 2 if name.startswith("MTP") else alone


def test_the_adapter_changes_the_answers(singles: dict[str, tuple[Answer, Answer]]) -> None:
    plain, expo = singles["runtime LoRA"]
    count = len(PROMPTS)
    assert expo["tokens"][:count] == singles[""][0]["tokens"]
    assert expo["tokens"][count:] == plain["tokens"][count:]
    assert expo["tokens"][count:] != expo["tokens"][:count]


@pytest.fixture(scope="module")
def parallels(llama: Pair) -> list[Answer]:
    """Tensor parallel, plain and ours; then ours pipeline- and data-parallel."""
    tensor, pipeline, data = (combination(f"{what} parallel").arguments() for what in ("tensor", "pipeline", "data"))
    runs = [llama.plain(**tensor), llama.expo(**tensor), llama.expo(**pipeline), llama.expo(**data)]
    return run_engines(runs, VLLM_CPU_OMP_THREADS_BIND="0|1")


@covers("tensor parallel", "tokens")
def test_two_tensor_parallel_ranks(parallels: list[Answer]) -> None:
    plain, expo, *_ = parallels
    assert len(plain["hashes"]) == 2
    assert expo["hashes"] == plain["hashes"]
    assert expo["tokens"] == plain["tokens"]
    assert [report["rank"] for report in expo["reports"]] == [0, 1]


@covers("pipeline parallel", "tokens")
def test_two_pipeline_ranks(parallels: list[Answer], singles: dict[str, tuple[Answer, Answer]]) -> None:
    expo = parallels[2]
    assert expo["tokens"] == singles[""][0]["tokens"]
    assert [report["rank"] for report in expo["reports"]] == [0, 1]


@covers("data parallel", "tokens")
def test_two_engines(parallels: list[Answer], singles: dict[str, tuple[Answer, Answer]]) -> None:
    assert parallels[3]["tokens"] == singles[""][0]["tokens"] * 2
