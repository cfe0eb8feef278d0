"""Tiny LoRA adapters written by hand, and how far two results lie apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from expo_serve.config import ExpoConfig
from expo_serve.plan.plan import Plan
from expo_serve.plan.prepare import prepare

PREFIX = "base_model.model."
FILE = "adapter_model.safetensors"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def factors(module: str, outputs: int, inputs: int, rank: int = 2, spread: float = 0.02) -> dict[str, torch.Tensor]:
    """The two factors of a linear module."""
    generator = torch.Generator().manual_seed(rank)
    a, b = (spread * torch.randn(*shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """Write an adapter whose config is the plainest, but for what is given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file({f"{PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE)
    return folder


def plan_delta(base: Path, delta: Path, alpha: float, **options: Any) -> Plan:
    """The plan of base and what lies in ``delta``; rounded to nearest, as PEFT rounds, unless ``options`` differ."""
    return prepare(ExpoConfig(base=str(base), delta=str(delta), alpha=alpha, **{"rounding": "nearest", **options}))


def units_apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """By how many units in the last place each value differs: 0 for 0.0 and -0.0."""
    assert one.dtype == other.dtype
    return (_ordered(one) - _ordered(other)).abs()


def _ordered(tensor: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the values, neighbours one apart."""
    integer = _INTEGERS[tensor.dtype]
    bits = tensor.contiguous().view(integer).long()
    return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)
