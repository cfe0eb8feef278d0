"""What has to be added to vLLM's ``reload_weights``, so that it leaves the weights of a fresh load, or fails."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch

from expo_serve.errors import LoadError, count_of
from expo_serve.vllm_plugin import compat


def check_taken(first: Set[str], taken: Set[str]) -> None:
    """Require a load in place to have taken the tensors that the first load took: vLLM itself only warns.

    Args:
        first: names of the tensors of which the model took something in its first load.
        taken: the same of the load in place.

    Raises:
        LoadError: they differ.
    """
    if differing := sorted(first ^ taken):
        raise LoadError(
            f"{count_of(len(differing), 'tensor was', 'tensors were')} taken by only one of the first load and the one "
            "in place, so the weights are not those of this alpha; please report this",
            differing,
        )


def forget_kernels(model: torch.nn.Module) -> None:
    """Let vLLM set up the kernels of experts on the CPU anew: it packs their weights only when it sets them up.

    Elsewhere a kernel stays, since captured graphs refer to what it holds.
    """
    if not compat.current_platform.is_cpu():
        return
    layer: Any
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def pack_again(model: torch.nn.Module) -> None:
    """Pack the matrices that vLLM's ``reload_weights`` leaves packed as they were.

    On the CPU vLLM computes with a packed copy of a matrix. Where two layers share a parameter, such as the embedding
    and the output projection, ``reload_weights`` packs it for the layer that the tensor is loaded for, only.
    """
    layer: Any
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if hasattr(layer, "cpu_linear") and isinstance(weight, torch.Tensor) and weight.numel():
            layer.quant_method.process_weights_after_loading(layer)
