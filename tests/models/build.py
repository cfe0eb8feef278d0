"""Tiny random pairs, written with the names and files of real checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

_SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}

FAMILIES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES, tie_word_embeddings=False),
    # Heads of 32, the smallest that vLLM's CPU attention computes, and the demo tokenizer's vocabulary.
    "llama-served": lambda: transformers.LlamaConfig(
        **{**_SIZES, "hidden_size": 256, "vocab_size": 49152}, tie_word_embeddings=True
    ),
    "llama-tied": lambda: transformers.LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**_SIZES, tie_word_embeddings=False),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZES, head_dim=8, tie_word_embeddings=True),
    "mixtral": lambda: transformers.MixtralConfig(**_SIZES, **_EXPERTS),
}
"""Name to config of a model small enough to build in a moment, with eight heads so that TP 2 divides."""


def build_pair(
    folder: Path,
    family: str | transformers.PretrainedConfig = "llama",
    *,
    base_dtype: torch.dtype = torch.bfloat16,
    aligned_dtype: torch.dtype = torch.bfloat16,
    base_shard_size: str = "5GB",
    aligned_shard_size: str = "5GB",
) -> tuple[Path, Path]:
    """Write ``folder/base`` and ``folder/aligned``: the second is the first after a small random step.

    Args:
        folder: where to.
        family: one of :data:`FAMILIES`, or a config of its own.
        base_dtype: of base's tensors.
        aligned_dtype: of aligned's.
        base_shard_size: as ``save_pretrained`` takes it.
        aligned_shard_size: likewise.
    """
    config = FAMILIES[family]() if isinstance(family, str) else family
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config)
    write_checkpoint(model, folder / "base", base_dtype, base_shard_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    write_checkpoint(model, folder / "aligned", aligned_dtype, aligned_shard_size)
    return folder / "base", folder / "aligned"


def write_checkpoint(model: Any, folder: Path, dtype: torch.dtype, max_shard_size: str = "5GB") -> None:
    """Save a model in ``dtype`` without changing it."""
    model.config.dtype = dtype
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
