"""One tensor of the result before it exists: shared by all the views that a model takes of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import copy
from functools import partial

import torch

from expo_serve.checkpoint.records import Operand
from expo_serve.config import format_alpha
from expo_serve.errors import ValuesError
from expo_serve.load import sizes
from expo_serve.load.dtypes import meta_tensor
from expo_serve.load.fill import Fill, operands_of
from expo_serve.load.operands import Recipe
from expo_serve.load.selection import Selection, cut
from expo_serve.load.session import LoadSession, Written
from expo_serve.load.threads import Executor, run_inline
from expo_serve.plan.names import is_leftover
from expo_serve.plan.plan import PlannedTensor


class PendingTensor:
    """A planned tensor and the session that computes its elements.

    ``value`` is None until an operation writes into the lazy tensor; from then on ``value`` is the tensor.

    Args:
        planned: what becomes of the tensor.
        session: reads, counts and runs the copies.

    Raises:
        CheckpointError: a file is gone, or has become shorter than its header said.
    """

    def __init__(self, planned: PlannedTensor, session: LoadSession) -> None:
        for record in planned.records:
            session.reader.check(record)
        self.planned = planned
        self.session = session
        self.whole = meta_tensor(planned.result)
        self.value: torch.Tensor | None = None
        self._recipes: dict[tuple[Operand, ...], Recipe] = {}
        self._is_leftover = is_leftover(planned.aligned)  # a mask may hold minus infinity

    def clone(self) -> PendingTensor:
        """Return the same elements, to be written into independently."""
        other = copy(self)
        other.value = None if self.value is None else self.value.clone()
        return other

    def write(self, dest: torch.Tensor, view: torch.Tensor, submit: Executor | None = None) -> None:
        """Compute the elements that ``view`` (meta) selects into ``dest`` of the same shape.

        Args:
            dest: where they go, on any device and of any dtype.
            view: which elements.
            submit: runs each block; by default as the session does.

        Raises:
            ValuesError: an element is not finite.
            CheckpointError: a file cannot be read.
        """
        if not view.numel():
            return
        if submit is None and self.value is None and self.session.stages.onto(dest.device):
            self._write_onto_device(dest, Selection.of(view))
            return
        submit = submit or self.session.submit
        if (value := self.value) is not None:
            submit(dest, lambda: _copy_plain(dest, select(value, view)))
            return
        block = sizes.BLOCK_BYTES // self.whole.element_size()
        for part, selection, recipe in self.parts(dest, Selection.of(view)):
            for out, chosen in cut(part, selection, block, recipe.operands.grain):
                fill = Fill(out, chosen, recipe, self.session, is_read_next=submit is run_inline)
                submit(out, fill, recipe.operands.spans(chosen))

    def _write_onto_device(self, dest: torch.Tensor, selection: Selection) -> None:
        session = self.session
        for part, chosen, recipe in self.parts(dest, selection):
            if chosen.numel:
                session.stages.fill(part, chosen, recipe)
                session.account(recipe, chosen, Written(part, partial(session.stages.run, dest.device)))
        session.stages.took(self, dest, selection)

    @property
    def key(self) -> tuple[object, ...]:
        """Name, shape and dtype."""
        return self.planned.name, tuple(self.whole.shape), self.whole.dtype

    @property
    def recipes(self) -> Iterable[Recipe]:
        """The recipes of its copies so far."""
        return self._recipes.values()

    def parts(self, dest: torch.Tensor, selection: Selection) -> Iterator[tuple[torch.Tensor, Selection, Recipe]]:
        """Cut a copy into parts of one recipe each: most often there is one."""
        for part, chosen, has_base in self._by_base_rows(dest, selection):
            yield part, chosen, self._recipe(has_base)

    def materialize(self, view: torch.Tensor) -> torch.Tensor:
        """Return the elements that ``view`` selects as a plain CPU tensor of its own."""
        self.session.counts.note(self.planned.name, "materialized" if self.planned.base else "copied")
        if self.value is not None:
            return select(self.value, view)
        result = torch.empty_like(view, device="cpu")  # keeps the strides of a dense view
        # A new tensor may get the address of a parameter that the model has just replaced: nothing may be deferred.
        self.write(result, view, run_inline)
        return result

    def keep(self) -> torch.Tensor:
        """Make the whole tensor real, for an operation that writes into it."""
        if self.value is None:
            self.value = self.materialize(self.whole)
        return self.value

    def _recipe(self, has_base: bool) -> Recipe:
        planned = self.planned
        used = planned.used(has_base and not self._is_leftover)
        if used not in self._recipes:
            operands = operands_of(planned, self.session.reader, used)
            fail = None if self._is_leftover else self._values_error
            key, is_extrapolated = planned.dither_key(used), len(used) > 1
            recipe = Recipe(operands, self.whole.dtype, planned.alpha, fail, planned.name, is_extrapolated, key)
            self._recipes[used] = recipe
        return self._recipes[used]

    def _by_base_rows(self, dest: torch.Tensor, selection: Selection) -> Iterator[tuple[torch.Tensor, Selection, bool]]:
        """Cut where base's rows end (a grown vocabulary); most often there is nothing to cut.

        Both operands are row-major with rows of one length, so an element has a partner in base exactly when its index
        is below base's number of elements.
        """
        end = self.planned.base.numel if self.planned.base else 0
        start = selection.offset
        if start >= end or selection.end <= end:
            yield dest, selection, start < end
            return
        dim = selection.outer_dim
        size, stride = selection.shape[dim], selection.stride[dim]
        below = min(size, max(0, (end - selection.select(dim, 0).end) // stride + 1))
        above = min(size, -((start - end) // stride))
        yield dest.narrow(dim, 0, below), selection.narrow(dim, 0, below), True
        for row in range(below, above):  # slices that straddle the cut: none for views along rows
            yield from self._by_base_rows(dest.select(dim, row), selection.select(dim, row))
        yield dest.narrow(dim, above, size - above), selection.narrow(dim, above, size - above), False

    def _values_error(self, culprit: str) -> ValuesError:
        """Build the error for a value that is not finite, given the operand it is in, or ``result``."""
        planned = self.planned
        if culprit == "result" or (culprit == "delta" and planned.delta and planned.delta.overflow_is_result_error):
            return ValuesError(
                f"tensor {planned.name!r}: extrapolated with alpha {format_alpha(planned.alpha)} it is too large for "
                f"its dtype ({planned.result.dtype}); choose a smaller alpha (file {planned.records[-1].file})"
            )
        record = planned.base if culprit == "base" and planned.base else planned.records[-1]
        return ValuesError(f"tensor {record.name!r} in {record.file} holds NaN or Inf; the checkpoint is damaged")


def _copy_plain(dest: torch.Tensor, value: torch.Tensor) -> None:
    with torch.no_grad():
        dest.copy_(value)


def select(whole: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """Take from a real tensor the elements that a view of its description selects."""
    return whole.as_strided(view.size(), view.stride(), whole.storage_offset() + view.storage_offset())
