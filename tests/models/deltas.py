"""Small deltas over a pair, in each of the three kinds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from expo_serve.cli import delta
from tests.models.reference import read_tensors

KINDS = ("packed", "lora", "full")


def write_delta(kind: str, base: Path, aligned: Path, folder: Path) -> Path:
    """Write ``folder/KIND``; a LoRA adapter goes where it will, the others lead to aligned."""
    out = folder / kind
    if kind == "packed":
        assert delta.main(["create", "--base", str(base), "--aligned", str(aligned), "--out", str(out)]) == 0
    elif kind == "lora":
        write_lora(base, out)
    else:
        write_full(base, aligned, out)
    return out


def write_lora(base: Path, out: Path, rank: int = 4) -> Path:
    """A random adapter on every projection of base that is stored as a matrix of its own."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, weight in read_tensors(base).items():
        if name.endswith("_proj.weight") and weight.dim() == 2:
            place = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator)
            tensors[f"{place}.lora_B.weight"] = 0.01 * torch.randn(weight.shape[0], rank, generator=generator)
    out.mkdir(parents=True)
    save_file(tensors, out / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": base.name}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def write_full(base: Path, aligned: Path, out: Path) -> Path:
    """``aligned - base`` in the dtype of the two."""
    before, after = read_tensors(base), read_tensors(aligned)
    out.mkdir(parents=True)
    save_file({name: tensor - before[name] for name, tensor in after.items()}, out / "model.safetensors")
    return out
