"""The lazy tensor: looks like a checkpoint's tensor, and is computed where it is copied to.

A model's ``load_weights`` narrows, chunks, views and transposes what the loader yields, then copies
it into a parameter. :class:`LazyTensor` does the views on a description alone (sizes, strides and
offset on the meta device; both sides share it) and the arithmetic in ``copy_``, straight into the
parameter, reading just the elements that the copy wants. Any other operation gets real values and
goes on, so a model may do what it likes with its weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from expo_serve.checkpoint.records import Operand
from expo_serve.config import format_alpha
from expo_serve.errors import ValuesError
from expo_serve.load.background import Executor, run_inline
from expo_serve.load.counts import Counts
from expo_serve.load.device import Stages
from expo_serve.load.dtypes import meta_tensor
from expo_serve.load.fill import Job, fill_here, operands_of
from expo_serve.load.operands import Operands
from expo_serve.load.reader import Reader
from expo_serve.load.selection import Selection, cut
from expo_serve.plan.names import is_leftover
from expo_serve.plan.plan import PlannedTensor

_aten = torch.ops.aten


BLOCK_BYTES = 8 << 20
"""Handed to a thread at a time: large enough that handing over costs nothing, small enough that the threads go through
the files side by side, and end together."""


class PendingTensor:
    """The sides of one tensor, shared by all the views that are taken of it.

    ``value`` is None until an operation writes into the lazy tensor; from then on it is the tensor.
    """

    def __init__(
        self, planned: PlannedTensor, reader: Reader, counts: Counts, run: Executor, stages: Stages | None
    ) -> None:
        self.planned = planned
        self.counts = counts
        self._run = run
        self._stages = stages
        self._reader = reader
        self._sides: dict[tuple[Operand, ...], Operands] = {}
        for record in planned.records:
            reader.check(record)
        self.whole = meta_tensor(planned.result)
        self.value: torch.Tensor | None = None
        self._is_leftover = is_leftover(planned.aligned)  # a mask may be minus infinity

    def clone(self) -> PendingTensor:
        """The same elements, to be written into apart."""
        other = copy(self)
        other.value = None if self.value is None else self.value.clone()
        return other

    def write(self, dest: torch.Tensor, view: torch.Tensor, run: Executor | None = None) -> None:
        """Compute the elements that ``view`` (meta) selects into ``dest`` of the same shape.

        Args:
            dest: where they go.
            view: which elements.
            run: how each block is done; by default as for all of the load.

        Raises:
            ValuesError: one of them is not finite.
            CheckpointError: a file cannot be read.
        """
        if not view.numel():
            return
        run = run or self._run
        if (value := self.value) is not None:
            run(dest, lambda: _copy_plain(dest, _select(value, view)))
            return
        block = BLOCK_BYTES // self.whole.element_size()
        for part, elements, has_base in self._by_base_rows(dest, Selection.of(view)):
            job = self._job(self.planned.used(has_base and not self._is_leftover))
            for out, chosen in cut(part, elements, block, job.sides.grain):
                run(out, partial(self._fill, out, chosen, job), job.sides.ranges(chosen))

    def _job(self, used: tuple[Operand, ...]) -> Job:
        if used not in self._sides:
            self._sides[used] = operands_of(self.planned, self._reader, used)
        fail = None if self._is_leftover else self._values_error
        return Job(self._sides[used], self._reader, self.whole.dtype, self.planned.alpha, fail)

    def _by_base_rows(self, dest: torch.Tensor, elements: Selection) -> Iterator[tuple[torch.Tensor, Selection, bool]]:
        """Cut where the base side's rows end (a grown vocabulary); most often there is nothing to cut.

        Both sides are row-major with rows of one size, so an element has a partner in base exactly
        when its index lies below base's number of elements.
        """
        end = self.planned.base.numel if self.planned.base else 0
        start = elements.offset
        if start >= end or elements.end <= end:
            yield dest, elements, start < end
            return
        dim = elements.outer_dim()
        size, stride = elements.shape[dim], elements.stride[dim]
        below = min(size, max(0, (end - elements.select(dim, 0).end) // stride + 1))
        above = min(size, -((start - end) // stride))
        yield dest.narrow(dim, 0, below), elements.narrow(dim, 0, below), True
        for row in range(below, above):  # slices that straddle the cut: none for views along rows
            yield from self._by_base_rows(dest.select(dim, row), elements.select(dim, row))
        yield dest.narrow(dim, above, size - above), elements.narrow(dim, above, size - above), False

    def _fill(self, dest: torch.Tensor, elements: Selection, job: Job) -> None:
        stage = self._stages.onto(dest.device) if self._stages else None
        (stage.fill if stage else fill_here)(dest, elements, job)
        for source, count in job.sides.read_bytes(elements).items():
            self.counts.add_read(source, count)

    def _values_error(self, what: str) -> ValuesError:
        planned = self.planned
        if what == "result" or (what == "delta" and planned.delta and planned.delta.is_computed):
            return ValuesError(
                f"tensor {planned.name!r}: extrapolated with alpha {format_alpha(planned.alpha)} it is too large for "
                f"its dtype ({planned.result.dtype}); choose a smaller alpha (file {planned.records[-1].file})"
            )
        record = planned.base if what == "base" and planned.base else planned.records[-1]
        return ValuesError(f"tensor {record.name!r} in {record.file} holds NaN or Inf; the checkpoint is damaged")

    def materialize(self, view: torch.Tensor) -> torch.Tensor:
        """The elements that ``view`` selects, as a plain tensor of its own."""
        self.counts.note(self.planned.name, "materialized" if self.planned.base else "copied")
        if self.value is not None:
            return _select(self.value, view)
        result = torch.empty_like(view, device="cpu")  # keeps the strides of a dense view
        self.write(result, view, run_inline)
        return result

    def keep(self) -> torch.Tensor:
        """Make the whole tensor real, for an operation that writes into it."""
        if self.value is None:
            self.value = self.materialize(self.whole)
        return self.value


def _copy_plain(dest: torch.Tensor, value: torch.Tensor) -> None:
    with torch.no_grad():
        dest.copy_(value)


def _select(whole: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    return whole.as_strided(view.size(), view.stride(), whole.storage_offset() + view.storage_offset())


class LazyTensor(torch.Tensor):
    """A tensor of the extrapolated model that is computed when it is copied.

    Shape, strides and dtype are those of the aligned side's tensor.
    """

    _pending: PendingTensor
    _view: torch.Tensor

    @staticmethod
    def __new__(cls, pending: PendingTensor, view: torch.Tensor) -> LazyTensor:
        """Wrap ``pending``; ``view`` is a meta tensor that says which of their elements."""
        lazy: LazyTensor = torch.Tensor._make_wrapper_subclass(
            cls, view.size(), strides=view.stride(), storage_offset=view.storage_offset(), dtype=view.dtype
        )
        lazy._pending = pending
        lazy._view = view
        return lazy

    # Without this every operation would pass through Python twice.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def materialize(self) -> torch.Tensor:
        """This tensor's values, as a plain tensor."""
        return self._pending.materialize(self._view)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyTensor({self._pending.planned.name!r}, shape={tuple(self.shape)}, dtype={self.dtype})"

    # These reach for the storage without an operation that could be intercepted.
    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`torch.Tensor.numpy`."""
        return self.materialize().numpy(*args, **kwargs)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return np.asarray(self.numpy(), *args, **kwargs)

    def tolist(self) -> Any:
        """See :meth:`torch.Tensor.tolist`."""
        return self.materialize().tolist()

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.materialize().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func is _aten.copy_.default and not isinstance(first, LazyTensor):
            return _copy_out(args[0], args[1])
        if func is _aten.clone.default and isinstance(first, LazyTensor) and _clones_layout(first, kwargs):
            return LazyTensor(first._pending.clone(), first._view)
        if func.is_view and isinstance(first, LazyTensor):
            return _take_view(first, func, args[1:], kwargs)
        if func._schema.is_mutable:
            return _run_mutable(func, args, kwargs)
        return func(*tree_map_only(LazyTensor, LazyTensor.materialize, args), **_real(kwargs))


def _clones_layout(lazy: LazyTensor, kwargs: dict[str, Any]) -> bool:
    """Whether a clone has the strides and offset of what it is made from: so for a whole tensor, whatever its order."""
    preserves = kwargs.get("memory_format") in (None, torch.preserve_format)
    is_whole = lazy.numel() == lazy._pending.whole.numel()
    return preserves and is_whole and torch.ops.aten.is_non_overlapping_and_dense(lazy._view)


def _real(kwargs: dict[str, Any]) -> dict[str, Any]:
    real: dict[str, Any] = tree_map_only(LazyTensor, LazyTensor.materialize, kwargs)
    return real


def _copy_out(dest: torch.Tensor, lazy: LazyTensor) -> torch.Tensor:
    pending, view = lazy._pending, lazy._view
    if view.shape != dest.shape:
        view = view.expand(dest.shape)
    if dest.is_meta:  # a dry run, as before online quantisation: nothing is read, nothing counted
        return dest
    pending.counts.note(pending.planned.name, "extrapolated" if pending.planned.base else "copied")
    pending.write(dest, view)
    return dest


def _take_view(lazy: LazyTensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    taken = func(lazy._view, *args, **kwargs)
    if isinstance(taken, torch.Tensor) and (taken.dtype != lazy.dtype or taken.is_neg() or taken.is_conj()):
        return func(lazy.materialize(), *args, **kwargs)  # it selects no elements, it reads them otherwise
    return tree_map_only(torch.Tensor, lambda view: LazyTensor(lazy._pending, view), taken)


def _run_mutable(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation that writes: where it writes into a lazy tensor, that one becomes real for good."""
    if torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(f"{func} on {args[0]!r}: take the view that makes a new tensor instead")

    def writable(tensor: LazyTensor) -> torch.Tensor:
        return _select(tensor._pending.keep(), tensor._view)

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


def lazy_tensor(
    planned: PlannedTensor, reader: Reader, counts: Counts, run: Executor = run_inline, stages: Stages | None = None
) -> LazyTensor:
    """The tensor that a loader yields for one planned tensor.

    Args:
        planned: what becomes of it.
        reader: opens its files.
        counts: counts what goes through.
        run: how the pieces of a copy are done; :meth:`Background.run` does them in threads.
        stages: the ways onto other devices; without them results are made here and copied.
    """
    pending = PendingTensor(planned, reader, counts, run, stages)
    return LazyTensor(pending, pending.whole)
