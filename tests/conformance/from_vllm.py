"""Checkpoints of models that transformers has no class for: named after what vLLM's own model wants to load.

Their configs are remote code on the hub. A tiny class of our own stands in for that, found in the same way; the
tensors get the names of vLLM's parameters, with what vLLM fuses (``packed_modules_mapping``, experts) taken apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.conformance.family import Family
from tests.conformance.running import prepare
from tests.conformance.tiny import shrink
from tests.inprocess import worker_config

_REMOTE_CODE = """from transformers import PretrainedConfig


class TinyConfig(PretrainedConfig):
    model_type = "{model_type}"
"""
_USUAL_PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_config(folder: Path, family: Family) -> None:
    """Write config.json and the class that it names."""
    folder.mkdir(parents=True)
    if family.config:
        import vllm.transformers_utils.configs

        config = getattr(vllm.transformers_utils.configs, family.config)
        sizes = shrink(config().to_dict(), **family.sizes)
        named = {"architectures": [family.architecture], "dtype": "bfloat16", "model_type": config.model_type}
        (folder / "config.json").write_text(json.dumps({**sizes, **named}, default=str))
        return
    model_type = f"tiny_{family.architecture.lower()}"
    named = {
        "model_type": model_type,
        "architectures": [family.architecture],
        "auto_map": {"AutoConfig": "configuration.TinyConfig"},
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps({**_SIZES, **named, **family.sizes}))
    (folder / "configuration.py").write_text(_REMOTE_CODE.format(model_type=model_type))


def write_pair_like_vllm(folder: Path, family: Family) -> tuple[Path, Path]:
    """Write ``folder/base`` and ``folder/aligned``, the second a small random step after the first."""
    generator = torch.Generator().manual_seed(7)
    for side in ("base", "aligned"):
        write_config(folder / side, family)
    shapes = _shapes(folder / "base", family)
    before = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    after = {name: tensor + torch.randn(tensor.shape, generator=generator) * 0.02 for name, tensor in before.items()}
    for side, tensors in (("base", before), ("aligned", after)):
        plain = {family.hub_name(name): tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        save_file(plain, folder / side / "model.safetensors", {"format": "pt"})
    return folder / "base", folder / "aligned"


def _shapes(folder: Path, family: Family) -> dict[str, tuple[int, ...]]:
    from vllm.model_executor.model_loader.utils import initialize_model

    prepare(folder)
    with worker_config(folder, trust_remote_code=True, **family.engine) as config:
        return {name: tuple(tensor.shape) for name, tensor in taken_apart(initialize_model(config))}


def taken_apart(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's parameters under the names of a checkpoint; of experts each has its own tensors."""
    packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", None) or _USUAL_PARTS
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        parent, _, module = path.rpartition(".")
        if leaf in ("w13_weight", "w2_weight"):
            yield from _experts(path.removesuffix(".routed_experts"), leaf, parameter)
        elif len(parts := packed.get(module, [])) > 1:
            for part, tensor in zip(parts, torch.split(parameter, _sizes(model.get_submodule(path))), strict=True):
                yield f"{parent}.{part}.{leaf}", tensor
        else:
            yield name, parameter


def _experts(path: str, leaf: str, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for index, expert in enumerate(parameter):
        if leaf == "w2_weight":
            yield f"{path}.{index}.down_proj.weight", expert
        else:
            gate, up = expert.chunk(2)
            yield f"{path}.{index}.gate_proj.weight", gate
            yield f"{path}.{index}.up_proj.weight", up


def _sizes(module: Any) -> list[int]:
    """Rows of the parts of a fused projection."""
    if hasattr(module, "total_num_kv_heads"):
        head, heads, shared = module.head_size, module.total_num_heads, module.total_num_kv_heads
        return [heads * head, shared * head, shared * head]
    return list(module.output_sizes)
