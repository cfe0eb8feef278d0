"""Which tensors the loader yields: by name, order and bits those of vLLM's own loader on the merged checkpoint.

A model says by attributes what it reads, and vLLM by its filters; a module with just these attributes will do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from expo_serve.config import Pinned, Source
from expo_serve.errors import CheckpointError, LoadError
from tests.conformance.combinations import covers
from tests.inprocess import state_of, vllm_model, worker_config
from tests.models import build_pair, reference_checkpoint, reference_tensors
from tests.models.raw import same_bits

pytestmark = pytest.mark.engine
ALPHA = 0.5
INDEX = "model.safetensors.index.json"


class Operands:
    """A pair in shards, and its merged checkpoint in the same shards."""

    def __init__(self, folder: Path, family: str) -> None:
        self.base, self.aligned = build_pair(folder, family, aligned_shard_size="60KB")
        self.merged = folder / "merged"
        shutil.copytree(self.aligned, self.merged)
        tensors = reference_tensors(self.base, self.aligned, ALPHA)
        self.shards: dict[str, list[str]] = {}
        for name, shard in json.loads((self.aligned / INDEX).read_text())["weight_map"].items():
            self.shards.setdefault(shard, []).append(name)
        for shard, names in self.shards.items():
            save_file({name: tensors[name] for name in names}, self.merged / shard, metadata={"format": "pt"})

    def only_in(self, shard: str) -> list[str]:
        """The names in one shard."""
        return self.shards[shard]

    def yielded(self, model: torch.nn.Module, prepare: Callable[[Any], None] | None = None) -> list[str]:
        """What the loader yields for a model, after checking that vLLM's own yields the same from merged.

        Args:
            model: anything with the attributes of a model.
            prepare: done to both loaders first, as vLLM does in ``load_weights``.
        """
        plain, found = (list(self.weights(model, prepare, is_ours)) for is_ours in (False, True))
        assert [name for name, _ in found] == [name for name, _ in plain]
        assert [name for (name, one), (_, other) in zip(plain, found, strict=True) if not same_bits(one, other)] == []
        return [name for name, _ in found]

    def weights(
        self, model: torch.nn.Module, prepare: Callable[[Any], None] | None, is_ours: bool
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """What one of the loaders yields."""
        from vllm.model_executor.model_loader import get_model_loader

        extra = {"load_format": "expo", "model_loader_extra_config": {"base": str(self.base), "alpha": ALPHA}}
        arguments: dict[str, Any] = extra if is_ours else {}
        with worker_config(self.aligned if is_ours else self.merged, **arguments) as config:
            loader: Any = get_model_loader(config.load_config)
            if prepare:
                prepare(loader)
            for name, tensor in loader.get_all_weights(config.model_config, model):
                yield name, tensor.clone()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Operands:
    return Operands(tmp_path_factory.mktemp("llama"), "llama")


def model_with(**attributes: Any) -> torch.nn.Module:
    model = torch.nn.Module()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def further(folder: Path, **settings: Any) -> Any:
    """A source beside the checkpoint, with a safetensors file and a pickle of two tensors."""
    from vllm.model_executor.model_loader import DefaultModelLoader

    (folder / "inner").mkdir(parents=True)
    tensors = {name: torch.randn(3, 4).to(torch.bfloat16) for name in ("one", "two")}
    save_file(tensors, folder / "inner" / "extra.safetensors")
    torch.save(tensors, folder / "inner" / "extra.pt")
    return DefaultModelLoader.Source(str(folder), None, subfolder="inner", prefix="head.", **settings)


def test_all_in_vllms_order(llama: Operands) -> None:
    assert len(llama.shards) > 2
    assert sorted(llama.yielded(model_with())) == sorted(name for names in llama.shards.values() for name in names)


def test_mistrals_own_format_beside_the_checkpoint_is_left_out(tmp_path: Path) -> None:
    base, aligned = build_pair(tmp_path)
    merged = reference_checkpoint(base, aligned, ALPHA, tmp_path / "merged")
    save_file({"layers.0.attention.wq.weight": torch.zeros(64, 64)}, aligned / "consolidated.safetensors")
    with vllm_model(merged) as model:
        expected = state_of(model)
    with vllm_model(
        aligned, load_format="expo", model_loader_extra_config={"base": str(base), "alpha": ALPHA}
    ) as model:
        found = state_of(model)
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


@covers("further weights from elsewhere", "bits")
@pytest.mark.parametrize("settings", [{}, {"allow_patterns_overrides": ["ext*.safetensors"]}])
@pytest.mark.usefixtures("destination")
def test_secondary_weights(llama: Operands, settings: dict[str, Any], tmp_path: Path) -> None:
    names = llama.yielded(model_with(secondary_weights=[further(tmp_path / "further", **settings)]))
    assert set(names[-2:]) == {"head.one", "head.two"}


def test_pickles_beside_the_checkpoint_are_never_opened(llama: Operands, tmp_path: Path) -> None:
    named = further(tmp_path / "named", allow_patterns_overrides=["extra.pt"])
    with pytest.raises(CheckpointError, match=r"further weights from extra\.pt: pickle files can run code"):
        llama.yielded(model_with(secondary_weights=[named]))
    # Without patterns vLLM alone falls back to the pickle where there is nothing else.
    fallen_back_to = further(tmp_path / "fallen")
    (tmp_path / "fallen" / "inner" / "extra.safetensors").unlink()
    model = model_with(secondary_weights=[fallen_back_to])
    assert [name for name, _ in llama.weights(model, None, is_ours=False)][-1] == "head.two"
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        list(llama.weights(model, None, is_ours=True))


@covers("files chosen by the model", "bits")
def test_allow_patterns_overrides(llama: Operands) -> None:
    first = min(llama.shards)
    names = llama.yielded(model_with(allow_patterns_overrides=[first]))
    assert sorted(names) == sorted(llama.only_in(first))


@covers("shards that the model does not use", "bits")
def test_is_unused_checkpoint_weight(llama: Operands) -> None:
    unused = min(llama.shards)
    names = llama.yielded(model_with(is_unused_checkpoint_weight=lambda name: name in llama.only_in(unused)))
    assert set(names).isdisjoint(llama.only_in(unused))
    assert len(names) == sum(map(len, llama.shards.values())) - len(llama.only_in(unused))


@covers("expert parallel, filtered by name", "bits")
def test_foreign_experts_are_not_named(tmp_path: Path) -> None:
    def keep_two(loader: Any) -> None:
        loader.local_expert_ids = {0, 2}

    sides = Operands(tmp_path, "mixtral")
    names = sides.yielded(model_with(), keep_two)
    assert {name.split(".experts.")[1].split(".")[0] for name in names if ".experts." in name} == {"0", "2"}


@covers("encoder only", "bits")
def test_shards_of_the_language_model_are_not_opened(llama: Operands) -> None:
    def encode_only(loader: Any) -> None:
        loader._encoder_only_lm_prefixes = ("model.layers.1.",)

    every, names = llama.yielded(model_with()), llama.yielded(model_with(), encode_only)
    dropped = set(every) - set(names)
    assert dropped
    assert all(name.startswith("model.layers.1.") for name in dropped)


def test_a_pinned_server_reloads_nothing_else(llama: Operands, tmp_path: Path) -> None:
    base, aligned = (Source(name=side.name, path=str(side)) for side in (llama.base, llama.aligned))
    pinned = Pinned(base=base, aligned=aligned).model_dump()
    extra = {"base": "base", "aligned": "aligned", "alpha": ALPHA, "pinned": pinned}
    with worker_config(llama.aligned, load_format="expo", model_loader_extra_config=extra) as config:
        from vllm.model_executor.model_loader import get_model_loader

        config.model_config.model = str(llama.merged)
        with pytest.raises(LoadError, match=r"merged were asked for, but .*aligned is deployed"):
            next(iter(get_model_loader(config.load_config).get_all_weights(config.model_config, model_with())))


class LateLayer(torch.nn.Module):
    """As vLLM's online-quantised experts: on meta, larger than the weight, so finished after all weights have come."""

    def __init__(self) -> None:
        from types import SimpleNamespace

        from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
        from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing

        class Halve(QuantizeMethodBase):  # type: ignore[misc]  # Any to mypy
            uses_meta_device = True

            def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
                """Nothing is left to make."""

            def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
                raise NotImplementedError

            def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
                (weight,) = layer.parameters()
                layer.weight = torch.nn.Parameter(weight.data[:256].half(), requires_grad=False)

        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(260, 64, dtype=torch.bfloat16, device="meta"), False)
        self.weight.weight_loader = _load_upper_rows  # type: ignore[attr-defined]
        self.quant_method = Halve()
        sizes = {"hidden_dim": 64, "hidden_dim_unpadded": 64, "intermediate_size_per_partition": 260}
        self.moe_config = SimpleNamespace(**sizes, intermediate_size_per_partition_unpadded=256)
        initialize_online_processing(self)


def _load_upper_rows(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    param.data[: len(loaded_weight)].copy_(loaded_weight)


class LateModel(torch.nn.Module):
    """One such layer, which takes the embedding, and a norm."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.late = LateLayer()
        self.norm = torch.nn.Parameter(torch.empty(64, dtype=torch.bfloat16), False)

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Take the two that are there for it."""
        for name, weight in weights:
            if name == "model.embed_tokens.weight":
                self.late.weight.weight_loader(self.late.weight, weight)  # type: ignore[attr-defined]
            if name == "model.norm.weight":
                self.norm.data.copy_(weight)


@pytest.mark.usefixtures("destination")
def test_layers_that_are_finished_later_are_in_the_report(
    llama: Operands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vllm.model_executor.model_loader import base_loader

    monkeypatch.setattr(base_loader, "initialize_model", lambda **given: LateModel(vllm_config=None))
    merged = reference_checkpoint(llama.base, llama.aligned, ALPHA, tmp_path / "merged")
    with vllm_model(merged) as model:
        expected = dict(model.named_parameters())["late.weight"].data.clone()
    extra = {"base": str(llama.base), "alpha": ALPHA}
    with vllm_model(llama.aligned, load_format="expo", model_loader_extra_config=extra) as model:
        report: Any = model.expo_load_report
        assert same_bits(dict(model.named_parameters())["late.weight"], expected)
    assert report.tensors == {"extrapolated": 2, "materialized": 0, "copied": 0}
    assert report.read_bytes == {"base": (256 + 1) * 64 * 2, "aligned": (256 + 1) * 64 * 2}
    assert report.weight_bytes == (256 + 1) * 64 * 2
