"""Another alpha loaded into a model in this process, as a sweep's worker does, and all that the model computes with."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import torch

from expo_serve.report import LoadReport


def load_alpha(config: Any, model: torch.nn.Module, alpha: float) -> LoadReport:
    """Load another alpha by the worker extension, over vLLM's own ``update_config`` and ``reload_weights``.

    Args:
        config: vLLM's, current.
        model: was loaded with it by our load format.
        alpha: the extrapolation factor.
    """
    from vllm.model_executor.model_loader.reload import inplace
    from vllm.v1.worker.gpu_worker import Worker

    from expo_serve.vllm_plugin.worker import ExpoWorkerExtension

    def reload_weights(weights_iterator: Any) -> None:
        inplace.reload_weights(config, model, weights_iterator, None, True)

    class OneModel(ExpoWorkerExtension):
        vllm_config = config
        model_runner = SimpleNamespace(reload_weights=reload_weights)
        update_config = Worker.update_config

        def get_model(self) -> torch.nn.Module:
            return model

    return LoadReport.model_validate_json(OneModel().expo_load_alpha(alpha))


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
