"""All that a model computes with, also where vLLM has packed it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def computed(model: torch.nn.Module) -> dict[str, str]:
    """Digests of every parameter and buffer, and of what every packed matrix makes of some input.

    On the CPU vLLM computes with a packed copy of most matrices, and leaves an empty parameter behind.
    """
    result = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if tensor.numel() and not tensor.is_meta:
            result[name] = _digest(tensor)
    layer: Any
    for name, layer in model.named_modules():
        if compute := getattr(layer, "cpu_linear", None):
            sizes = ("input_size_per_partition", "input_size", "embedding_dim")
            width = next(size for key in sizes if (size := getattr(layer, key, 0)))
            given = torch.randn(3, width, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
            result[f"{name} (computed)"] = _digest(compute(given, layer.weight, None))
    return result


def _digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()
