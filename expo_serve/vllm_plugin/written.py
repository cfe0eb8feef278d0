"""After a load: was every parameter of the model filled from the checkpoint, and if not, may that be?"""

from __future__ import annotations

import re
from typing import Any

import torch

from expo_serve.errors import LoadError
from expo_serve.vllm_plugin import compat
from expo_serve.weights.coverage import WriteTracker, still_lazy

Hole = tuple[int, int]
"""Elements of a parameter that were written, and that are there."""


def check_written(model: torch.nn.Module, tracker: WriteTracker, runner: str) -> list[str]:
    """Tell the parameters that the checkpoint should have filled from those that no checkpoint of this model fills.

    Args:
        model: just loaded.
        tracker: has seen the writes.
        runner: vLLM's ``runner_type`` of the model: ``generate``, ``pooling`` or ``draft``.

    Returns:
        The parameters that keep what vLLM made them with, as they do without expo.

    Raises:
        LoadError: a parameter, or a part of it, was left out.
    """
    if kept := still_lazy(model):
        raise LoadError(f"{len(kept)} parameters were kept lazily instead of being copied; please report it", kept)
    holes = {name: hole for name, hole in tracker.unwritten().items() if not _may_lack(model, name, hole, runner)}
    quantised = {name: (0, there) for name, there in tracker.untouched_on_meta().items() if _made_late(model, name)}
    unfilled = _never_filled(model, holes, runner)
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
        return _is_padded(module)
    borrows = runner == "draft" and isinstance(module, compat.VocabParallelEmbedding)
    return borrows or isinstance(getattr(module, "quant_method", None), compat.BaseKVCacheMethod)


def _never_filled(model: torch.nn.Module, holes: dict[str, Hole], runner: str) -> list[str]:
    """The holes that are a trait of the model's code, not of this checkpoint: a bias that no file has, a head that is
    not used when tokens are not generated. Then the same parameter is empty in every layer; a lost tensor leaves a
    hole in one. A matrix is never optional where tokens are generated."""
    parameters = dict(model.named_parameters())
    empty = {name for name, (written, _) in holes.items() if not written}
    filled = {_in_any_layer(name) for name in parameters if name not in empty}
    return [
        name
        for name in holes
        if name in empty and _in_any_layer(name) not in filled and (runner == "pooling" or parameters[name].dim() < 2)
    ]


def _in_any_layer(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _made_late(model: torch.nn.Module, name: str) -> bool:
    """Online quantisation begins on meta; whatever else is on meta was left out of this rank's model on purpose."""
    return bool(getattr(getattr(_owner(model, name), "quant_method", None), "uses_meta_device", False))


def _owner(model: torch.nn.Module, name: str) -> torch.nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _is_padded(module: Any) -> bool:
    """Whether vLLM made a layer of experts larger than the model's, for its kernels."""
    moe = getattr(module, "moe_config", None)
    return moe is not None and (
        moe.hidden_dim != moe.hidden_dim_unpadded
        or moe.intermediate_size_per_partition != moe.intermediate_size_per_partition_unpadded
    )
