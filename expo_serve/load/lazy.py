"""The lazy tensor: looks like a checkpoint's tensor, and is computed where it is copied to.

A model's ``load_weights`` narrows, chunks, views and transposes what the loader yields, then copies it to a parameter.
:class:`LazyTensor` applies the views to a description alone (sizes, strides and offset on the meta device, which both
operands share) and does the arithmetic in ``copy_``, straight into the parameter, reading just the elements that the
copy needs. Any other operation gets real values and goes on, so a model may do what it likes with its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import tree_map_only

from expo_serve.load.pending import PendingTensor, select
from expo_serve.load.session import LoadSession
from expo_serve.load.torch_internals import Operation, disabled_torch_function, make_wrapper_subclass
from expo_serve.plan.plan import PlannedTensor

_aten = torch.ops.aten
_BY_INDEX = {
    *(_aten.slice, _aten.select, _aten.split, _aten.split_with_sizes, _aten.unbind, _aten.view, _aten.detach),
    *(_aten.alias, _aten.t, _aten.transpose, _aten.permute, _aten.unsqueeze, _aten.squeeze, _aten.expand),
}
"""Views that are defined by indices, not by strides: the same elements, in whatever layout."""
Array = npt.NDArray[np.generic]
Arguments = TypeVar("Arguments", list[object], dict[str, object])


class LazyTensor(torch.Tensor):
    """A tensor of the extrapolated model that is computed when it is copied.

    Shape, strides and dtype are those of the aligned side's tensor.
    """

    _pending: PendingTensor
    _view: torch.Tensor
    _shown: torch.Tensor

    @staticmethod
    def __new__(cls, pending: PendingTensor, view: torch.Tensor, shown: torch.Tensor | None = None) -> LazyTensor:
        """Wrap ``pending``.

        Args:
            pending: the tensor in the checkpoint.
            view: a meta tensor that selects the elements.
            shown: one of the same shape with the strides that the lazy tensor has; those of ``view`` by default.
        """
        shown = view if shown is None else shown
        lazy: LazyTensor = make_wrapper_subclass(
            cls, shown.size(), strides=shown.stride(), storage_offset=shown.storage_offset(), dtype=view.dtype
        )
        lazy._pending = pending
        lazy._view = view
        lazy._shown = shown
        return lazy

    @property
    def is_relaid(self) -> bool:
        """Whether it has other strides than its elements in the checkpoint."""
        return self._shown is not self._view

    @property
    def pending(self) -> PendingTensor:
        """The tensor of which this is a view."""
        return self._pending

    # Without this every operation would pass through Python twice.
    __torch_function__ = disabled_torch_function  # type: ignore[assignment]

    def materialize(self) -> torch.Tensor:
        """Return the values as a plain CPU tensor."""
        values = self._pending.materialize(self._view)
        return values.contiguous() if self.is_relaid else values

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"LazyTensor({self._pending.planned.name!r}, shape={tuple(self.shape)}, dtype={self.dtype})"

    # These reach for the storage without an operation that could be intercepted.
    def numpy(self, *, force: bool = False) -> Array:
        """Return the values as an array of their own memory, as :meth:`torch.Tensor.numpy` does."""
        return self.materialize().numpy(force=force)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        return np.asarray(self.numpy(), dtype)

    def tolist(self) -> list[object]:
        """Return the values as nested lists of Python numbers."""
        return self.materialize().tolist()

    def __deepcopy__(self, memo: object) -> torch.Tensor:
        return self.materialize().clone()

    def __reduce_ex__(self, protocol: object) -> object:  # type: ignore[override]
        return self.materialize().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Operation,
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func is _aten.copy_.default and not isinstance(first, LazyTensor):
            return _copy_out(first, args[1])  # type: ignore[arg-type]  # the operation's schema: both are tensors
        if func is _aten.clone.default and isinstance(first, LazyTensor):
            return _clone(first, kwargs)
        if func.is_view and isinstance(first, LazyTensor):
            return _take_view(first, func, args[1:], kwargs)
        if func._schema.is_mutable:
            return _run_mutable(func, args, kwargs)
        return func(*_real(list(args)), **_real(dict(kwargs)))


def _clone(lazy: LazyTensor, kwargs: Mapping[str, object]) -> torch.Tensor:
    """Return a clone: a lazy one if its layout is that of a whole tensor, or contiguous.

    A whole tensor keeps its strides, in whatever order it is stored; of a part, a contiguous clone has others.
    """
    layout = kwargs.get("memory_format") or torch.preserve_format
    if not lazy.is_relaid and _is_distinct(lazy._view):
        is_whole = lazy.numel() == lazy._pending.whole.numel()
        if layout is torch.preserve_format and is_whole:
            return LazyTensor(lazy._pending.clone(), lazy._view)
        if layout is torch.contiguous_format:
            return LazyTensor(lazy._pending.clone(), lazy._view, torch.empty_like(lazy._view, memory_format=layout))
    cloned: torch.Tensor = _aten.clone.default(lazy.materialize(), **kwargs)
    return cloned


def _is_distinct(view: torch.Tensor) -> bool:
    """Return whether no two elements share a place, where a write to one would reach the other."""
    reach = 0
    for step, size in sorted(zip(view.stride(), view.size(), strict=True)):
        if size > 1 and step <= reach:
            return False
        reach += step * (size - 1)
    return True


def _real(arguments: Arguments) -> Arguments:
    """Replace the lazy tensors among the arguments of an operation by real ones."""
    real: Arguments = tree_map_only(LazyTensor, LazyTensor.materialize, arguments)
    return real


def _copy_out(dest: torch.Tensor, lazy: LazyTensor) -> torch.Tensor:
    pending, view = lazy._pending, lazy._view
    if view.shape != dest.shape:
        view = view.expand(dest.shape)
    if dest.is_meta:  # a dry run, as before online quantisation: nothing is read, nothing counted
        return dest
    pending.session.counts.note(pending.planned.name, "extrapolated" if pending.planned.base else "copied")
    pending.write(dest, view)
    return dest


def _take_view(lazy: LazyTensor, func: Operation, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
    taken = _selected(lazy, func, args, kwargs)
    if taken is None:
        return func(lazy.materialize(), *args, **kwargs)
    shown: Any = func(lazy._shown, *args, **kwargs) if lazy.is_relaid else taken
    if isinstance(taken, torch.Tensor):
        return LazyTensor(lazy._pending, taken, shown)
    return [LazyTensor(lazy._pending, *pair) for pair in zip(taken, shown, strict=True)]


def _selected(
    lazy: LazyTensor, func: Operation, args: Sequence[object], kwargs: Mapping[str, object]
) -> torch.Tensor | Sequence[torch.Tensor] | None:
    """Return the elements that a view selects, one meta tensor or several; None if it needs their values."""
    if lazy.is_relaid and func.overloadpacket not in _BY_INDEX:
        return None
    try:
        taken: torch.Tensor | Sequence[torch.Tensor] = func(lazy._view, *args, **kwargs)
    except RuntimeError:
        if lazy.is_relaid:  # of rows that lie apart, one dimension cannot be made
            return None
        raise
    if isinstance(taken, torch.Tensor) and (taken.dtype != lazy.dtype or taken.is_neg() or taken.is_conj()):
        return None  # it selects no elements, it reinterprets them
    return taken


def _run_mutable(func: Operation, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
    """Run an operation that writes; a lazy tensor into which it writes becomes real for good."""
    if torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(f"{func} on {args[0]!r}: take the view that makes a new tensor instead")

    def writable(tensor: LazyTensor) -> torch.Tensor:
        return select(tensor._pending.keep(), tensor._view)

    schema = func._schema.arguments
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in schema]
    real_args = [
        tree_map_only(LazyTensor, writable if write else LazyTensor.materialize, argument)
        for argument, write in zip(args, written, strict=False)
    ]
    outputs = {argument.name for argument, write in zip(schema, written, strict=True) if write}
    real_kwargs = {
        key: tree_map_only(LazyTensor, writable if key in outputs else LazyTensor.materialize, value)
        for key, value in kwargs.items()
    }
    result = func(*real_args, **real_kwargs)
    return args[0] if written[0] and isinstance(args[0], LazyTensor) else result


def lazy_tensor(planned: PlannedTensor, session: LoadSession) -> LazyTensor:
    """Make the tensor that a loader yields for one planned tensor.

    Raises:
        CheckpointError: a file is gone, or has become shorter than its header said.
    """
    pending = PendingTensor(planned, session)
    return LazyTensor(pending, pending.whole)
