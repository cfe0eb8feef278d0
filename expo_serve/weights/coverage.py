"""Which parameters of a model were really written while it loaded.

vLLM's own check believes what ``load_weights`` returns and exempts most linear layers; this one
watches the writes.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_Written = set[tuple[int, torch.Size, tuple[int, ...]]]


class WriteTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which every write into the parameters of ``model`` is seen.

    A write is remembered by the view it went to, so writing one place twice counts once. A
    parameter whose storage was replaced counts as written.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._before = {name: _storage(parameter) for name, parameter in model.named_parameters()}
        self._written: defaultdict[int, _Written] = defaultdict(set)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for index, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._note(args[index] if index < len(args) else kwargs.get(argument.name))
        return func(*args, **kwargs)

    def _note(self, dest: Any) -> None:
        if type(dest) in (torch.Tensor, torch.nn.Parameter) and (key := _storage(dest)):
            self._written[key].add((dest.storage_offset(), dest.shape, dest.stride()))

    def unwritten(self) -> dict[str, tuple[int, int]]:
        """The parameters that were not written whole: name to (elements written, elements there)."""
        result = {}
        for name, parameter in self._model.named_parameters():
            key = _storage(parameter)
            if not key or self._before.get(name) != key:
                continue
            written = sum(shape.numel() for _, shape, _ in self._written[key])
            if written < parameter.numel():
                result[name] = (written, parameter.numel())
        return result


def _storage(tensor: torch.Tensor) -> int:
    """Identity of a tensor's memory; 0 for a tensor without any (meta device, no elements)."""
    return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()
