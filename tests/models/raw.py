"""Tiny checkpoints written by hand, down to the bytes of their headers: quick, and free to be wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "vocab_size": 16,
    "tie_word_embeddings": False,
}


def tiny_tensors(
    seed: int = 0,
    *,
    layers: int = 2,
    hidden: int = 8,
    vocabulary: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:
    """Random tensors under the names of a Llama."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {"model.embed_tokens.weight": tensor(vocabulary, hidden), "lm_head.weight": tensor(vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.self_attn.q_proj.weight"] = tensor(hidden, hidden)
        tensors[f"{prefix}.mlp.up_proj.weight"] = tensor(12, hidden)
        tensors[f"{prefix}.input_layernorm.weight"] = tensor(hidden)
    return tensors


def write_raw(
    folder: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
    *,
    shards: Sequence[Sequence[str]] = (),
    **config: Any,
) -> Path:
    """Write a checkpoint: one file, or with ``shards`` (names by file) several and their index."""
    tensors = tiny_tensors() if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **_vocabulary(tensors), **config}))
    if not shards:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    write_index(folder, weight_map)
    return folder


def _vocabulary(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The size of the vocabulary that the first embedding or output has."""
    ends = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "lm_head.weight")
    rows = [tensor.shape[0] for name, tensor in tensors.items() if name.endswith(ends) and tensor.dim() == 2]
    return {"vocab_size": rows[0]} if rows else {}


def write_pair(folder: Path, alpha_step: float = 0.02, **config: Any) -> tuple[Path, Path]:
    """Write ``folder/base`` and ``folder/aligned``, the second a small step away."""
    before = tiny_tensors()
    step = tiny_tensors(1)
    after = {name: (tensor + alpha_step * step[name]).to(tensor.dtype) for name, tensor in before.items()}
    return write_raw(folder / "base", before, **config), write_raw(folder / "aligned", after, **config)


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    """Write an index that says where each tensor lies, true or not."""
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict(weight_map)}))


def entry(dtype: str, shape: Sequence[int], begin: int, end: int) -> dict[str, Any]:
    """One tensor's part of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def file_bytes(header: Mapping[str, Any] | str | bytes, data: bytes = b"") -> bytes:
    """The bytes of a safetensors file with this header, whatever it says."""
    if isinstance(header, Mapping):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + data


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have one shape, one dtype and the same bits: -0.0 is not 0.0."""
    return one.shape == other.shape and one.dtype == other.dtype and _bits(one) == _bits(other)


def _bits(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()
