"""The pairs that vLLM loads, and the merged checkpoint beside them, made from them by an independent reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.device_check import files
from loadtests.device_check.outcome import Skipped
from loadtests.device_check.setting import Setting
from loadtests.device_check.vllm_worker import ALPHA

_SIZES = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Heads of 64: vLLM's attention in Triton and on the CPU wants at least 32; blocks of 128 divide all matrices."""
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
_LARGE = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
}


@dataclass(frozen=True)
class Models:
    """Folders of three checkpoints."""

    base: Path
    aligned: Path
    merged: Path


def models(setting: Setting, family: str) -> Models:
    """A pair and its merged checkpoint, made by the first case that wants them.

    Raises:
        Skipped: transformers is not there, which writes checkpoints as real ones are.
    """
    size = "-quick" if setting.quick else ""
    folder = files.made_once(setting.work / f"vllm-{family}{size}", lambda to: _make(to, _configs(setting)[family]))
    return Models(folder / "base", folder / "aligned", folder / "merged")


def _configs(setting: Setting) -> dict[str, Callable[[Any], Any]]:
    """Name to what makes a config of transformers' classes."""
    large = {} if setting.quick else _LARGE
    return {
        "llama": lambda library: library.LlamaConfig(**_SIZES, tie_word_embeddings=False),
        "mixtral": lambda library: library.MixtralConfig(**_SIZES, **_EXPERTS),
        "large": lambda library: library.LlamaConfig(**{**_SIZES, **large}, tie_word_embeddings=False),
    }


def _make(folder: Path, config: Callable[[Any], Any]) -> None:
    try:
        import transformers
    except ImportError as error:
        raise Skipped(f"transformers cannot be imported: {error}") from None
    from tests.models import build_pair, reference_checkpoint

    base, aligned = build_pair(folder, config(transformers))
    reference_checkpoint(base, aligned, ALPHA, folder / "merged")
