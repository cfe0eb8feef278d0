"""Which parameters of a model were really written while it loaded.

vLLM's own check believes what ``load_weights`` returns and exempts most linear layers; this one
watches the writes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from expo_serve.load.lazy import LazyTensor


@dataclass(frozen=True)
class _Region:
    """The bytes of a storage that a tensor covers: runs of ``run`` bytes from ``offset`` on, at the places
    that ``outer`` (sizes and strides) gives."""

    offset: int
    run: int
    outer: tuple[tuple[int, int], ...]

    @staticmethod
    def of(tensor: torch.Tensor) -> _Region:
        """The region of a tensor with elements."""
        item = tensor.element_size()
        run = int(item)
        outer = []
        for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
            if size > 1 and stride * item == run:
                run *= size
            elif size > 1:
                outer.append((size, stride * item))
        return _Region(int(tensor.storage_offset()) * item, run, tuple(outer))

    def divisor(self) -> int:
        """The largest cell in bytes whose borders this region keeps to."""
        return math.gcd(self.offset, self.run, *(stride for _, stride in self.outer))

    def select(self, cells: torch.Tensor, size: int) -> torch.Tensor:
        """This region's part of a vector with one element for each cell of ``size`` bytes."""
        shape = [count for count, _ in self.outer]
        strides = [stride // size for _, stride in self.outer]
        return cells.as_strided([*shape, self.run // size], [*strides, 1], self.offset // size)


def unwatched() -> AbstractContextManager[Any]:
    """A context for our own reading, which writes to no parameter: watching each of its operations is what costs."""
    context: AbstractContextManager[Any] = _disable_current_modes()
    return context


class WriteTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which every write into the parameters of ``model`` is seen.

    A write is remembered by the bytes it went to, so writing one place twice counts once. A parameter whose storage
    was replaced counts as written, but not one that began on the meta device: there vLLM tries every write before it
    makes the layer and quantises it, and what was tried is what will have been written.

    Args:
        model: whose parameters are watched.
        settle: called before any operation that may look at values, while lazy tensors are being copied in the
            background.
    """

    def __init__(self, model: torch.nn.Module, settle: Callable[[], None] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._settle = settle
        self._before = {name: _storage(parameter) for name, parameter in model.named_parameters()}
        # Held, so that no other storage gets the identity of one that is replaced.
        self._on_meta = {name: part.detach() for name, part in model.named_parameters() if part.is_meta}
        self._wanted = set(self._before.values()) - {0}
        self._written: defaultdict[int, set[_Region]] = defaultdict(set)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._settle and not func.is_view and not _is_lazy_copy(func, args):
            self._settle()
        if func._schema.is_mutable:
            for index, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._note(args[index] if index < len(args) else kwargs.get(argument.name))
        return func(*args, **kwargs)

    def _note(self, dest: Any) -> None:
        for tensor in dest if isinstance(dest, (list, tuple)) else [dest]:
            is_plain = type(tensor) is torch.Tensor or isinstance(tensor, torch.nn.Parameter)
            if is_plain and (key := _storage(tensor)) in self._wanted and tensor.numel():
                self._written[key].add(_Region.of(tensor))

    def unwritten(self) -> dict[str, tuple[int, int]]:
        """The parameters that were not written whole: name to (elements written, elements there).

        One that began on the meta device is not missed when nothing was written to it: see :meth:`untouched_on_meta`.
        """
        kept = {
            name: parameter
            for name, parameter in self._model.named_parameters()
            if (key := _storage(parameter)) and self._before.get(name) == key
        }
        result = {}
        for name, parameter in {**kept, **self._on_meta}.items():
            written = _written_elements(parameter, self._written[_storage(parameter)])
            if written < parameter.numel() and not (parameter.is_meta and not written):
                result[name] = (written, parameter.numel())
        return result

    def untouched_on_meta(self) -> dict[str, int]:
        """The parameters that began on the meta device and to which nothing was written: name to elements."""
        untouched = {name: part for name, part in self._on_meta.items() if not self._written[_storage(part)]}
        return {name: part.numel() for name, part in untouched.items() if part.numel()}


def still_lazy(model: torch.nn.Module) -> list[str]:
    """Parameters and buffers that a model made out of lazy tensors instead of copying from them."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [name for name, tensor in tensors.items() if isinstance(tensor, LazyTensor)]


def _is_lazy_copy(func: Any, args: tuple[Any, ...]) -> bool:
    return func is torch.ops.aten.copy_.default and isinstance(args[1], LazyTensor) and type(args[0]) is not LazyTensor


def _written_elements(parameter: torch.Tensor, regions: set[_Region]) -> int:
    """Selection that at least one region covers, counted on the coarsest cells that all the regions keep to."""
    whole = _Region.of(parameter)
    if whole in regions or not regions:
        return parameter.numel() if regions else 0
    size = math.gcd(whole.divisor(), *(region.divisor() for region in regions))
    cells = torch.zeros(-(-parameter.untyped_storage().nbytes() // size), dtype=torch.bool, device="cpu")
    for region in regions:
        region.select(cells, size).fill_(True)
    return int(whole.select(cells, size).sum()) * size // parameter.element_size()


def _storage(tensor: torch.Tensor) -> int:
    """Identity of a tensor's memory, also of what stands for it on the meta device; 0 for a tensor without any."""
    if isinstance(tensor, LazyTensor) or not tensor.numel():
        return 0
    storage = tensor.untyped_storage()
    identity: int = storage._cdata if tensor.is_meta else storage.data_ptr()
    return identity
