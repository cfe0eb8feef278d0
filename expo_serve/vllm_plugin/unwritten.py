"""After a load: was every parameter of the model filled from the checkpoint, and where not, may that be?"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch

from expo_serve.errors import LoadError
from expo_serve.load.coverage import WriteTracker, still_lazy
from expo_serve.vllm_plugin import compat

Hole = tuple[int, int]
"""Selection of a parameter that were written, and that are there."""
_COMMON_LEAVES = ("weight", "bias")


def check_written(model: torch.nn.Module, tracker: WriteTracker, runner: str, dropped: Mapping[str, int]) -> list[str]:
    """Every parameter must come from the checkpoint, but for what no checkpoint can carry.

    Args:
        model: just loaded.
        tracker: has seen the writes.
        runner: vLLM's ``runner_type`` of the model: ``generate``, ``pooling`` or ``draft``.
        dropped: tensors that the model was given and took nothing of, and their numbers of elements.

    Returns:
        The parameters that stay as vLLM made them because its code leaves them so, with or without us.

    Raises:
        LoadError: a parameter, or a part of it, was left out.
    """
    if kept := still_lazy(model):
        raise LoadError(f"{len(kept)} parameters were kept lazily instead of being copied; please report it", kept)
    holes = {name: hole for name, hole in tracker.unwritten().items() if not _may_lack(model, name, hole, runner)}
    unfilled = [name for name, hole in holes.items() if _is_left_by_vllm(model, name, hole, runner, dropped)]
    untouched = {name: (0, there) for name, there in tracker.untouched_on_meta().items()}
    quantised = {name: hole for name, hole in untouched.items() if made_late(_owner(model, name))}
    missing = {name: hole for name, hole in {**holes, **quantised}.items() if name not in unfilled}
    if missing:
        raise LoadError(
            f"{len(missing)} parameters were not loaded from the checkpoint; it is not a checkpoint of this model",
            [f"{name}: {written} of {there} elements" for name, (written, there) in missing.items()],
        )
    return unfilled


def _may_lack(model: torch.nn.Module, name: str, hole: Hole, runner: str) -> bool:
    """KV-cache scales have defaults, padding holds nothing, a draft gets the target's embedding and head where it has
    none of its own."""
    module = _owner(model, name)
    if hole[0]:
        return hole[0] in _unpadded_sizes(module, hole[1])
    borrows = runner == "draft" and isinstance(module, compat.VocabParallelEmbedding)
    return borrows or isinstance(getattr(module, "quant_method", None), compat.BaseKVCacheMethod)


def _is_left_by_vllm(model: torch.nn.Module, name: str, hole: Hole, runner: str, dropped: Mapping[str, int]) -> bool:
    """An output projection that a pooling model does not use, or a parameter whose tensor vLLM's code does not find:
    it was given one of this very name and size."""
    if hole[0]:
        return False
    leaf = name.rpartition(".")[2]
    is_lost = leaf not in _COMMON_LEAVES and any(
        other.rpartition(".")[2] == leaf and size == hole[1] for other, size in dropped.items()
    )
    return is_lost or (runner == "pooling" and isinstance(_owner(model, name), compat.ParallelLMHead))


def made_late(module: torch.nn.Module) -> bool:
    """Whether online quantisation makes a layer, beginning on meta; what else is on meta was left out on purpose."""
    return bool(getattr(getattr(module, "quant_method", None), "uses_meta_device", False))


def _owner(model: torch.nn.Module, name: str) -> torch.nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _unpadded_sizes(module: Any, elements: int) -> set[int]:
    """How many elements a checkpoint has for a parameter of experts that vLLM made larger, for its kernels."""
    moe = getattr(module, "moe_config", None)
    if moe is None:
        return set()
    hidden = Fraction(moe.hidden_dim_unpadded, moe.hidden_dim)
    inner = Fraction(moe.intermediate_size_per_partition_unpadded, moe.intermediate_size_per_partition)
    # Matrices have both sizes, biases one of them.
    return {int(elements * share) for share in (hidden * inner, hidden, inner)}
