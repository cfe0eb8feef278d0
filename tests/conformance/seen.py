"""What a load does: the operations that the model's code applies to what our loader yields, and the layers it fills."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expo_serve.load.lazy import LazyTensor


@dataclass
class Seen:
    """Sorted names. ``operations`` are those of torch's dispatcher, where ``copy_ cast`` is a copy into another dtype;
    ``layers`` the classes of the modules that own a parameter."""

    operations: set[str] = field(default_factory=set)
    layers: set[str] = field(default_factory=set)


@contextmanager
def watched() -> Iterator[Seen]:
    """Note what all loads by our loader do meanwhile."""
    from expo_serve.vllm_plugin.loader import ExpoModelLoader

    seen, load_weights = Seen(), ExpoModelLoader.load_weights

    def load_and_note(loader: Any, model: torch.nn.Module, *arguments: Any) -> None:
        with _Noted(seen.operations):
            load_weights(loader, model, *arguments)
        seen.layers |= {type(module).__name__ for module in model.modules() if _owns_a_parameter(module)}

    with mock.patch.object(ExpoModelLoader, "load_weights", load_and_note):
        yield seen


def _owns_a_parameter(module: torch.nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


class _Noted(TorchDispatchMode):
    def __init__(self, operations: set[str]) -> None:
        super().__init__()
        self._operations = operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        lazy = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, LazyTensor)]
        if lazy:
            name = func._schema.name.removeprefix("aten::")
            is_cast = name == "copy_" and args[0].dtype != lazy[-1].dtype
            self._operations.add(f"{name} cast" if is_cast else name)
        return func(*args, **kwargs)
