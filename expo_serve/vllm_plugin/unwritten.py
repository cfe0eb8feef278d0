"""Check after a load: every parameter must be filled from the checkpoint, with a few justified exceptions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from fractions import Fraction
from typing import Any

import torch

from expo_serve.errors import LoadError, count_of
from expo_serve.load.coverage import WriteTracker, still_lazy
from expo_serve.vllm_plugin import compat

Hole = tuple[int, int]
"""Numbers of elements of a parameter: written ones, and all."""
_COMMON_LEAVES = ("weight", "bias")


def check_written(model: torch.nn.Module, tracker: WriteTracker, runner: str, dropped: Mapping[str, int]) -> list[str]:
    """Check that every parameter came from the checkpoint, except those that no checkpoint contains.

    Args:
        model: the model after ``load_weights``.
        tracker: has recorded the writes.
        runner: vLLM's ``runner_type`` of the model: ``generate``, ``pooling`` or ``draft``.
        dropped: tensors that the model was given but did not use, and their numbers of elements.

    Returns:
        Parameters that vLLM's code never fills, with or without expo-serve.

    Raises:
        LoadError: a parameter, or a part of it, was not written.
    """
    if kept := still_lazy(model):
        raise LoadError(f"{_parameters(kept)} kept as lazy tensors instead of being copied; please report this", kept)
    holes = {name: hole for name, hole in tracker.unwritten().items() if not _may_lack(model, name, hole, runner)}
    unfilled = [name for name, hole in holes.items() if _is_left_by_vllm(model, name, hole, runner, dropped)]
    untouched = {name: (0, there) for name, there in tracker.untouched_on_meta().items()}
    quantised = {name: hole for name, hole in untouched.items() if is_quantised_late(_owner(model, name))}
    missing = {name: hole for name, hole in {**holes, **quantised}.items() if name not in unfilled}
    if missing:
        raise LoadError(
            f"{_parameters(missing)} not loaded from the checkpoint; expected a checkpoint of this model",
            [f"{name}: {written} of {there} elements" for name, (written, there) in missing.items()],
        )
    return unfilled


def check_taken(first: Set[str], taken: Set[str]) -> None:
    """Require ``reload_weights`` to have taken the tensors that the first load took: vLLM itself only warns.

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


def _may_lack(model: torch.nn.Module, name: str, hole: Hole, runner: str) -> bool:
    """Return whether no checkpoint has these elements.

    KV-cache scales have defaults, padding has no values, and a draft without an embedding or head uses the target's.
    """
    module = _owner(model, name)
    if hole[0]:
        return hole[0] in _unpadded_sizes(module, hole[1])
    borrows = runner == "draft" and isinstance(module, compat.VocabParallelEmbedding)
    return borrows or isinstance(getattr(module, "quant_method", None), compat.BaseKVCacheMethod)


def _is_left_by_vllm(model: torch.nn.Module, name: str, hole: Hole, runner: str, dropped: Mapping[str, int]) -> bool:
    """Return whether vLLM's code leaves this parameter unfilled.

    That is the output projection of a pooling model, which is not used, or a parameter whose tensor vLLM does not
    recognise although the checkpoint has one with the same last name and size.
    """
    if hole[0]:
        return False
    leaf = name.rpartition(".")[2]
    is_lost = leaf not in _COMMON_LEAVES and any(
        other.rpartition(".")[2] == leaf and size == hole[1] for other, size in dropped.items()
    )
    return is_lost or (runner == "pooling" and isinstance(_owner(model, name), compat.ParallelLMHead))


def is_quantised_late(module: torch.nn.Module) -> bool:
    """Return whether online quantisation creates the layer's parameters after the load, starting on the meta device."""
    return bool(getattr(getattr(module, "quant_method", None), "uses_meta_device", False))


def _parameters(names: Collection[str]) -> str:
    return count_of(len(names), "parameter was", "parameters were")


def _owner(model: torch.nn.Module, name: str) -> torch.nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _unpadded_sizes(module: Any, elements: int) -> set[int]:
    """Return the possible numbers of elements, without padding, of an expert parameter that vLLM's kernels pad."""
    moe = getattr(module, "moe_config", None)
    if moe is None:
        return set()
    hidden = Fraction(moe.hidden_dim_unpadded, moe.hidden_dim)
    inner = Fraction(moe.intermediate_size_per_partition_unpadded, moe.intermediate_size_per_partition)
    # Matrices have both sizes, biases one of them.
    return {int(elements * share) for share in (hidden * inner, hidden, inner)}
