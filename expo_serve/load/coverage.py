"""Which parameters of a model were really written while it loaded.

vLLM's own check believes what ``load_weights`` returns and exempts most linear layers; this one watches the writes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expo_serve.load.lazy import LazyTensor
from expo_serve.load.selection import Selection
from expo_serve.load.torch_internals import Operation, storage_identity, without_modes


def unwatched() -> AbstractContextManager[object]:
    """Return a context for our own reading, which writes to no parameter and need not be watched."""
    return without_modes()


class WriteTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every write into the parameters of ``model`` while its context is entered.

    A write is recorded by the bytes it went to, so writing one place twice counts once. A parameter whose storage was
    replaced counts as written, except one that began on the meta device: there vLLM tries every write on meta
    tensors before it makes and quantises the layer, so the tried writes are recorded.

    Args:
        model: the model whose parameters are watched.
        settle: called with the tensors of any operation that may look at their values, since copies of lazy tensors may
            still be under way in threads.
    """

    def __init__(self, model: torch.nn.Module, settle: Callable[[Sequence[torch.Tensor]], None] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._settle = settle
        self._before = {name: _storage(parameter) for name, parameter in model.named_parameters()}
        # Held, so that no other storage takes over the identity of a replaced one.
        self._on_meta = {name: part.detach() for name, part in model.named_parameters() if part.is_meta}
        self._wanted = set(self._before.values()) - {0}
        self._written: defaultdict[int, set[Selection]] = defaultdict(set)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Leave out torch's wrapper around :meth:`__torch_dispatch__`, which no compiled code calls: it takes longer
        than the method."""
        return False

    def __torch_dispatch__(
        self,
        func: Operation,
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if self._settle and not func.is_view and not _is_lazy_copy(func, args):
            self._settle(_tensors_of(args, kwargs))
        if func._schema.is_mutable:
            for index, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._note(args[index] if index < len(args) else kwargs.get(argument.name))
        return func(*args, **kwargs)

    def _note(self, dest: object) -> None:
        for tensor in dest if isinstance(dest, (list, tuple)) else [dest]:
            if not (type(tensor) is torch.Tensor or isinstance(tensor, torch.nn.Parameter)):
                continue
            if (key := _storage(tensor)) in self._wanted and tensor.numel():
                self._written[key].add(_bytes_of(tensor))

    def unwritten(self) -> dict[str, tuple[int, int]]:
        """Return the parameters that were not written whole: name to (elements written, elements in all).

        A parameter that began on the meta device and got nothing is in :meth:`untouched_on_meta` instead.
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
        """Return the parameters that began on the meta device and got nothing: name to elements."""
        untouched = {name: part for name, part in self._on_meta.items() if not self._written[_storage(part)]}
        return {name: part.numel() for name, part in untouched.items() if part.numel()}


def still_lazy(model: torch.nn.Module) -> list[str]:
    """Name the parameters and buffers that a model made out of lazy tensors instead of copying from them."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [name for name, tensor in tensors.items() if isinstance(tensor, LazyTensor)]


def _is_lazy_copy(func: Operation, args: Sequence[object]) -> bool:
    return func is torch.ops.aten.copy_.default and isinstance(args[1], LazyTensor) and type(args[0]) is not LazyTensor


def _tensors_of(*arguments: object) -> list[torch.Tensor]:
    """Return the tensors among the arguments of an operation; a lazy tensor has no memory of its own."""
    return [one for one in tree_leaves(arguments) if isinstance(one, torch.Tensor) and type(one) is not LazyTensor]


def _bytes_of(tensor: torch.Tensor) -> Selection:
    """Return the bytes of its storage that a tensor with elements covers; the last dimension is contiguous."""
    item = tensor.element_size()
    if tensor.is_contiguous():  # most often
        return Selection.flat(int(tensor.storage_offset()) * item, tensor.nbytes)
    elements = Selection.of(tensor)
    stride = tuple(step * item for step in elements.stride)
    ordered, _ = Selection((*elements.shape, item), (*stride, 1), elements.offset * item).in_file_order()
    return ordered.merged()


def _written_elements(parameter: torch.Tensor, regions: set[Selection]) -> int:
    """Count the elements that at least one region covers, using the largest cell to which every region is aligned."""
    whole = _bytes_of(parameter)
    if whole in regions or not regions:
        return parameter.numel() if regions else 0
    size = math.gcd(*(_divisor(region) for region in (whole, *regions)))
    cells = torch.zeros(-(-parameter.untyped_storage().nbytes() // size), dtype=torch.bool, device="cpu")
    for region in regions:
        _cells(region, cells, size).fill_(True)
    return int(_cells(whole, cells, size).sum()) * size // parameter.element_size()


def _divisor(region: Selection) -> int:
    """Return the largest cell in bytes to which a region is aligned."""
    return math.gcd(region.offset, region.shape[-1], *region.stride[:-1])


def _cells(region: Selection, cells: torch.Tensor, size: int) -> torch.Tensor:
    """Return a region's part of a vector with one element for each cell of ``size`` bytes."""
    shape = [*region.shape[:-1], region.shape[-1] // size]
    return cells.as_strided(shape, [*(step // size for step in region.stride[:-1]), 1], region.offset // size)


def _storage(tensor: torch.Tensor) -> int:
    """Identify a tensor's memory; 0 for a tensor without any."""
    return 0 if isinstance(tensor, LazyTensor) or not tensor.numel() else storage_identity(tensor)
