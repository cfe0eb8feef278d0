"""Extrapolating together with what else vLLM does, at the level of the loader: every bit that a rank holds."""

from __future__ import annotations

import importlib
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]  # vLLM's own way of sending things
import pytest
import torch

from expo_serve.errors import LoadError
from expo_serve.report import LoadReport
from tests import compare
from tests.compare import State, by_expo, differing, load
from tests.conformance.combinations import COMBINATIONS, combination, covered, covers
from tests.inprocess import hash_state, vllm_model, worker_config
from tests.models import build_pair, reference_checkpoint
from tests.models.extras import (
    add_mtp_head,
    build_multimodal_pair,
    build_served_pair,
    call_mimo,
    drop_tensor,
    write_eagle_head,
)
from tests.rank_state import run_ranks

pytestmark = pytest.mark.engine
ALPHA = 0.5


def load_both(base: Path, aligned: Path, scratch: Path, **arguments: Any) -> tuple[list[str], LoadReport]:
    """Load plainly and ours; gives the names whose bits differ, and our report."""
    merged = reference_checkpoint(base, aligned, ALPHA, scratch / "merged")
    return compare.load_both(merged, aligned, by_expo(base, ALPHA), **arguments)


def both_loads(folder: Path, family: str, **arguments: Any) -> list[dict[str, Any]]:
    """For :func:`run_ranks`: plain and ours."""
    base, aligned = build_pair(folder / "pair", family)
    merged = reference_checkpoint(base, aligned, ALPHA, folder / "merged")
    return [{"path": str(merged), **arguments}, {"path": str(aligned), **arguments, **by_expo(base, ALPHA)}]


RANKS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: ("mixtral", combination(name).arguments())
        for name in ("tensor parallel", "expert parallel", "expert parallel, filtered by name")
    },
    "tensor parallel, dense": ("llama", {}),
    "pipeline parallel": ("llama", {"tensor_parallel_size": 1, "pipeline_parallel_size": 2}),
    "pipeline parallel, tied": ("llama-tied", {"tensor_parallel_size": 1, "pipeline_parallel_size": 2}),
}
"""What two ranks load: the family and vLLM's arguments."""

RankAnswer = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pairs of the ranks are, by name."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> dict[str, list[tuple[RankAnswer, RankAnswer]]]:
    """By name, what each rank got plainly and from us; the two ranks load all of it."""
    loads = [load for name, (family, given) in RANKS.items() for load in both_loads(folder / name, family, **given)]
    answers = run_ranks(loads, folder / "store")
    return {name: [(rank[2 * number], rank[2 * number + 1]) for rank in answers] for number, name in enumerate(RANKS)}


@covers("tensor parallel", "bits")
@covers("expert parallel", "bits")
@covers("expert parallel, filtered by name", "bits")
@covers("pipeline parallel", "bits")
@pytest.mark.parametrize("name", RANKS)
def test_two_ranks(ranks: dict[str, list[tuple[RankAnswer, RankAnswer]]], name: str) -> None:
    for rank, (plain, found) in enumerate(ranks[name]):
        assert len(set(plain["hashes"].values())) > 8
        assert found["hashes"] == plain["hashes"]
        assert found["rank"] == rank


@pytest.mark.parametrize("name", ["tensor parallel", "tensor parallel, dense"])
def test_a_rank_reads_half(ranks: dict[str, list[tuple[RankAnswer, RankAnswer]]], folder: Path, name: str) -> None:
    size = (folder / name / "pair" / "aligned" / "model.safetensors").stat().st_size
    for _, found in ranks[name]:
        assert set(found["read_bytes"]) == {"base", "aligned"}
        for read in found["read_bytes"].values():
            assert 0.44 * size < read < 0.56 * size  # half, and the vectors that every rank holds whole


def test_a_rank_reads_only_its_share(ranks: dict[str, list[tuple[RankAnswer, RankAnswer]]]) -> None:
    reads = {name: [sum(found["read_bytes"].values()) for _, found in answers] for name, answers in ranks.items()}
    counts = {name: [found["tensors"]["extrapolated"] for _, found in answers] for name, answers in ranks.items()}
    # Half of each expert is as much as half of the experts: four of three matrices in two layers.
    assert reads["tensor parallel"] == reads["expert parallel"] == reads["expert parallel, filtered by name"]
    assert [count - 4 * 3 * 2 // 2 for count in counts["tensor parallel"]] == counts["expert parallel"]
    assert counts["expert parallel, filtered by name"] == counts["expert parallel"]
    assert counts["pipeline parallel"] == [10, 11]  # nine of a layer, and the embedding or norm and lm_head


@pytest.mark.slow
@covers("quantised: int8_per_channel_weight_only", "bits")
@covers("quantised: nvfp4_per_token", "bits")
@pytest.mark.parametrize("method", ["int8_per_channel_weight_only", "nvfp4_per_token"])
@pytest.mark.usefixtures("destination")
def test_quantised(method: str, tmp_path: Path) -> None:
    arguments = combination(f"quantised: {method}").arguments()
    differ, _ = load_both(*build_served_pair(tmp_path), tmp_path, **arguments)
    assert differ == []


@pytest.mark.slow
@covers("quantised: fp8, fp8_per_tensor", "bits")
@pytest.mark.parametrize("method", ["fp8", "fp8_per_tensor"])
@pytest.mark.usefixtures("destination")
def test_quantised_by_a_kernel_that_the_cpu_build_lacks(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantise(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        largest = torch.finfo(torch.float8_e4m3fn).max
        return (weight.float() / scale).clamp(-largest, largest).to(torch.float8_e4m3fn), scale

    monkeypatch.setattr("vllm._custom_ops.scaled_fp8_quant", quantise)
    differ, report = load_both(*build_served_pair(tmp_path), tmp_path, quantization=method)
    assert differ == []
    assert report.tensors == {"extrapolated": 21, "materialized": 0, "copied": 0}


@pytest.mark.parametrize("missing", ["self_attn.k_proj", "self_attn.o_proj"])
@pytest.mark.usefixtures("destination")
def test_a_quantised_layer_without_a_weight_is_an_error(missing: str, tmp_path: Path) -> None:
    base, aligned = build_served_pair(tmp_path)
    for folder in (base, aligned):
        drop_tensor(folder, f"model.layers.1.{missing}.weight")
    with (
        pytest.raises(LoadError, match=r"1 parameter was not loaded"),
        vllm_model(aligned, quantization="fp8_per_channel", **by_expo(base, ALPHA)),
    ):
        pass


@pytest.mark.slow
@covers("draft model", "bits")
@covers("EAGLE head", "bits")
@pytest.mark.parametrize("name", ["draft model", "EAGLE head"])
def test_a_draft_of_its_own_loads_as_it_is(name: str, tmp_path: Path) -> None:
    base, aligned = build_pair(tmp_path)
    draft = base if name == "draft model" else write_eagle_head(base, tmp_path / "eagle")
    arguments = {"role": "draft", **combination(name).arguments(speculative_config__model=str(draft))}
    expected, _ = load(aligned, **arguments)
    found, report = load(aligned, **arguments, **by_expo(base, ALPHA))
    assert report is None
    assert differing(found, expected) == []


def mtp_arguments() -> dict[str, Any]:
    return {"role": "draft", **combination("MTP head in the checkpoint").arguments()}


@pytest.mark.slow
@covers("MTP head in the checkpoint", "bits")
@pytest.mark.usefixtures("destination")
def test_a_head_on_both_sides_is_extrapolated(tmp_path: Path) -> None:
    base, aligned = build_pair(tmp_path, "qwen2")
    add_mtp_head(base, 1)
    add_mtp_head(aligned, 2)
    differ, report = load_both(base, aligned, tmp_path, **mtp_arguments())
    assert differ == []
    assert report.tensors == {"extrapolated": 18, "materialized": 0, "copied": 0}  # 16 of the head, embedding, lm_head


@pytest.mark.slow
@covers("MTP head in the checkpoint", "bits")
@pytest.mark.usefixtures("destination")
def test_a_head_on_the_aligned_side_only_is_copied(tmp_path: Path) -> None:
    base, aligned = build_pair(tmp_path, "qwen2")
    call_mimo(base)
    add_mtp_head(aligned, 2)
    differ, report = load_both(base, aligned, tmp_path, **mtp_arguments())
    assert differ == []
    assert report.tensors == {"extrapolated": 2, "materialized": 0, "copied": 16}


@pytest.mark.slow
@pytest.mark.usefixtures("destination")
def test_a_head_beside_tied_embeddings_gets_the_targets(tmp_path: Path) -> None:
    """vLLM gives the draft the target's lm_head, so that the checkpoint need not hold it twice."""
    base, aligned = build_pair(tmp_path, "qwen2")
    for seed, folder in enumerate((base, aligned)):
        add_mtp_head(folder, seed)
        drop_tensor(folder, "lm_head.weight")
        call_mimo(folder, tie_word_embeddings=True)
    differ, _ = load_both(base, aligned, tmp_path, **mtp_arguments())
    assert {name.split()[0] for name in differ} <= {"lm_head.weight"}


@covers("multimodal", "bits")
@covers("encoder only", "bits")
@covers("language model only", "bits")
@pytest.mark.parametrize(
    "name",
    ["multimodal", *(pytest.param(part, marks=pytest.mark.slow) for part in ("encoder only", "language model only"))],
)
@pytest.mark.usefixtures("destination")
def test_multimodal(name: str, tmp_path: Path) -> None:
    base, aligned = build_multimodal_pair(tmp_path, shard_size="60KB")
    differ, report = load_both(base, aligned, tmp_path, **combination(name).arguments())
    assert differ == []
    # Of 113 that are used, 36 are the language model's and 39 the tower's.
    assert report.tensors["extrapolated"] == {"multimodal": 113, "encoder only": 77, "language model only": 36}[name]
    assert report.weight_bytes == report.read_bytes["aligned"]


def _hashes_in_a_fresh_process(pickled: bytes, path: str) -> dict[str, str]:
    from vllm.config import set_current_vllm_config
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    load_config, loader = pickle.loads(pickled)
    with worker_config(path) as config:
        config.load_config = load_config
        with set_current_vllm_config(config):
            return hash_state(loader.load_model(vllm_config=config, model_config=config.model_config))


@covers("another process with the config alone", "bits")
def test_config_and_loader_travel(tmp_path: Path) -> None:
    """vLLM on CPU has no Ray; what Ray's workers get is the pickled configuration, and they start afresh."""
    from vllm.model_executor.model_loader import get_model_loader

    base, aligned = build_pair(tmp_path)
    merged = reference_checkpoint(base, aligned, ALPHA, tmp_path / "merged")
    with vllm_model(merged) as model:
        expected = {name: digest for name, digest in hash_state(model).items() if "(loaded)" not in name}
    with worker_config(aligned, **by_expo(base, ALPHA)) as config:
        sent = cloudpickle.dumps((config.load_config, get_model_loader(config.load_config)))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(_hashes_in_a_fresh_process, sent, str(aligned)).result(timeout=120) == expected


@covers("weights loaded again", "bits")
@pytest.mark.usefixtures("destination")
def test_one_loader_twice(tmp_path: Path) -> None:
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    base, aligned = build_pair(tmp_path)
    with worker_config(aligned, **by_expo(base, ALPHA)) as config:
        loader = get_model_loader(config.load_config)
        with set_default_torch_dtype(torch.bfloat16):
            model = initialize_model(config)
        states, reports = [], []
        for _ in range(2):
            for parameter in model.parameters():
                parameter.data.zero_()
            loader.load_weights(model, config.model_config)
            states.append(hash_state(model))
            reports.append(model.expo_load_report)
    assert states[0] == states[1]
    assert len(set(states[0].values())) > 10
    assert reports[0].tensors == reports[1].tensors
    assert reports[0].read_bytes == reports[1].read_bytes


@covers("weights loaded again", "bits")
@pytest.mark.usefixtures("destination")
def test_reload_in_place(tmp_path: Path) -> None:
    """From alpha 0 to 0.5 by vLLM's ``reload_weights``; packed matrices are compared by what they compute."""
    from vllm.model_executor.model_loader.reload import inplace

    base, aligned = build_pair(tmp_path)
    merged = reference_checkpoint(base, aligned, ALPHA, tmp_path / "merged")
    with vllm_model(merged) as model:
        expected = _computed(model)
    loads = by_expo(base, ALPHA)
    with worker_config(aligned, **loads) as config:
        from vllm.model_executor.model_loader import get_model

        config.load_config.model_loader_extra_config = {**loads["model_loader_extra_config"], "alpha": 0}
        model = get_model(vllm_config=config)
        before = _computed(model)
        config.load_config.model_loader_extra_config = loads["model_loader_extra_config"]
        inplace.reload_weights(config, model, None, None, True)
        after = _computed(model)
    assert len(expected) == 15
    assert [name for name in expected if torch.equal(before[name], expected[name])] == []
    assert [name for name in expected if not torch.equal(after[name], expected[name])] == []


def _computed(model: torch.nn.Module) -> State:
    """What every linear layer makes of some input, and the other parameters themselves."""
    result = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            result[f"{name}.{key}"] = parameter.data.clone()
        if (compute := getattr(module, "cpu_linear", None)) and not module.weight.numel():
            generator = torch.Generator().manual_seed(1)
            given = torch.randn(3, module.input_size_per_partition, generator=generator).to(torch.bfloat16)
            result[f"{name}.weight"] = compute(given, module.weight, None)
    return result


def test_every_combination_is_covered() -> None:
    for module in ("engines", "sources"):
        importlib.import_module(f"tests.vllm_plugin.test_combinations_{module}")
    assert covered() == {one.name: one.compared for one in COMBINATIONS}


@pytest.mark.parametrize("one", [one for one in COMBINATIONS if one.flags], ids=lambda one: one.name)
def test_the_flags_are_those_of_vllm(one: Any) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsed = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(list(one.flags))
    for name, value in one.arguments().items():
        found = getattr(parsed, name)
        if isinstance(value, dict) and not isinstance(found, dict):  # made into a config of vLLM's
            found = {key: getattr(found, key) for key in value}
        assert found == value
