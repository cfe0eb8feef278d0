"""Tiny random pairs of every family, written as the hub ships them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.conformance.family import Family
from tests.conformance.from_vllm import write_pair_like_vllm
from tests.conformance.tiny import shrink


def write_pair(folder: Path, family: Family) -> tuple[Path, Path]:
    """Write ``folder/base`` and ``folder/aligned``, the second a small random step after the first."""
    if not has_transformers_class(family):
        return write_pair_like_vllm(folder, family)
    model_class = getattr(transformers, family.like or family.architecture)
    torch.manual_seed(7)
    model = model_class(tiny_config(model_class.config_class, dict(family.sizes))).to(torch.bfloat16)
    for side, step in (("base", 0.0), ("aligned", 0.02)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * step)
        model.save_pretrained(folder / side)
        _name_as_hub(folder / side, family)
    return folder / "base", folder / "aligned"


def has_transformers_class(family: Family) -> bool:
    """Whether transformers can write its checkpoints; otherwise they are made after vLLM's own model."""
    return not family.config and hasattr(transformers, family.like or family.architecture)


def tiny_config(config_class: Any, sizes: dict[str, Any]) -> Any:
    """The default config of a class, made tiny."""
    return config_class.from_dict(shrink(config_class().to_dict(), **sizes))


def _name_as_hub(folder: Path, family: Family) -> None:
    """transformers names its own class in the config, and some tensors otherwise than the files of the hub do."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [family.architecture]}))
    if family.hub_names or family.transposed:
        file = folder / "model.safetensors"
        save_file(dict(_as_hub(load_file(file), family)), file, {"format": "pt"})


def _as_hub(tensors: dict[str, torch.Tensor], family: Family) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        transposed = family.transposed and re.search(family.transposed, name)
        yield family.hub_name(name), tensor.transpose(-1, -2).contiguous() if transposed else tensor
