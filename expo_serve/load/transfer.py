"""One piece of a tensor on its way onto a device: what of it is read on the host, and what the device makes of that."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch

from expo_serve.checkpoint.records import Operand
from expo_serve.errors import LoadError
from expo_serve.load.formula import NotFiniteError, combine_into, combine_unchecked
from expo_serve.load.operands import Memory, Recipe
from expo_serve.load.reader import Buffer
from expo_serve.load.selection import Selection, cut
from expo_serve.load.threads import Task

_ALIGNMENT = 16
"""Of each operand in a turn's memory: what a device loads at once."""
_LEAST_BYTES = 1 << 20
"""Read by one thread at a time: handing over less costs more than it brings."""


class Transfer(Protocol):
    """A piece, between the threads that read it and the device that combines it."""

    recipe: Recipe
    selection: Selection

    @property
    def size(self) -> int:
        """Bytes of memory that it needs, on the host and on the device."""

    def reads(self, host: torch.Tensor, threads: int) -> Sequence[Task]:
        """Return the tasks that read it; threads may do them at once.

        Args:
            host: :attr:`size` bytes.
            threads: how many there are.
        """

    def ranges(self) -> Sequence[tuple[int, int]]:
        """Return first and last byte of what has to be copied, once it has been read."""

    def combine(self, out: torch.Tensor, device: torch.Tensor) -> torch.Tensor:
        """Enqueue what the device computes; gradients are off.

        Args:
            out: where the result goes.
            device: :attr:`size` bytes there, with what was read.

        Returns:
            The values whose sum shows whether all are finite.
        """


class StoredTransfer:
    """A piece whose operands are read as they are, or computed by the host, and combined by the device.

    Args:
        recipe: how it is computed.
        selection: which elements of the tensor.
        operands: those that are copied; all by default.
    """

    def __init__(self, recipe: Recipe, selection: Selection, operands: Sequence[Operand] = ()) -> None:
        self.recipe, self.selection = recipe, selection
        self._ordered, self._positions = _in_file_order(selection)
        self._places: dict[Operand, tuple[int, torch.dtype]] = {}
        self.size = 0
        dtypes = recipe.operands.dtypes
        for operand in operands or dtypes:
            dtype = dtypes[operand]
            self._places[operand] = self.size, dtype
            self.size += aligned(self._ordered.numel * dtype.itemsize)

    def reads(self, host: torch.Tensor, threads: int) -> Sequence[Task]:
        return [partial(self._read, part, start, host) for part, start in parts_of(self._ordered, self.recipe, threads)]

    def _read(self, part: Selection, start: int, host: torch.Tensor) -> None:
        self.recipe.operands.read(part, self._memory(host, start))

    def _memory(self, host: torch.Tensor, start: int) -> Memory:
        """Return memory for the elements of each operand from element ``start`` of the piece on."""

        def memory(operand: Operand, size: int) -> Buffer:
            place, dtype = self._places[operand]
            first = place + start * dtype.itemsize
            return Buffer(host[first : first + size])

        return memory

    def ranges(self) -> Sequence[tuple[int, int]]:
        return [(0, self.size)]

    def combine(self, out: torch.Tensor, device: torch.Tensor) -> torch.Tensor:
        recipe = self.recipe
        operands = {operand: self._operand(operand, device) for operand in self._places}
        return combine_unchecked(out, operands, recipe.dtype, recipe.alpha, recipe.noise(self.selection, out.device))

    def _operand(self, operand: Operand, memory: torch.Tensor) -> torch.Tensor:
        place, dtype = self._places[operand]
        values = memory[place : place + self._ordered.numel * dtype.itemsize].view(dtype)
        return values.view(self._ordered.shape).permute(self._positions).expand(self.selection.shape)


def _in_file_order(selection: Selection) -> tuple[Selection, tuple[int, ...]]:
    """Order as :meth:`Selection.in_file_order` does; contiguous elements, which are most, are so already."""
    if selection.is_contiguous and 0 not in selection.stride:
        return selection, tuple(range(len(selection.shape)))
    return selection.in_file_order()


def parts_of(ordered: Selection, recipe: Recipe, threads: int) -> list[tuple[Selection, int]]:
    """Cut what is to be read into parts for threads, each with the number of elements before it.

    Args:
        ordered: in file order.
        recipe: its operands may have elements that are best read together.
        threads: as many parts, where they are not too small.
    """
    operands = recipe.operands
    share = max(-(-ordered.numel // threads), _LEAST_BYTES // operands.widest, 1)
    if ordered.numel <= share:
        return [(ordered, 0)]
    grain = operands.grain if operands.grain < ordered.numel else 1
    index = torch.empty(ordered.shape, device="meta")
    return [(part, int(out.storage_offset())) for out, part in cut(index, ordered, share, grain)]


def aligned(size: int) -> int:
    """Round up to what a device loads at once."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def check_on_host(recipe: Recipe, selection: Selection) -> None:
    """Find out why the device's sum of a piece is not finite, by computing the piece again: the sum may overflow.

    Raises:
        LoadError: no value is so large that the sum could; the device has computed other values.
        ExpoError: a value is not finite, or a file cannot be read.
    """
    if recipe.fail is None:
        return

    def memory(operand: Operand, size: int) -> Buffer:
        return Buffer(torch.empty(size, dtype=torch.uint8, device="cpu"))

    operands = recipe.operands.read(selection, memory)
    value = torch.empty(selection.shape, dtype=recipe.dtype, device="cpu")
    try:
        with torch.no_grad():
            combine_into(value, operands, recipe.dtype, recipe.alpha, recipe.noise(selection, value.device))
    except NotFiniteError as error:
        raise recipe.fail(str(error)) from None
    if value.abs().sum(dtype=torch.float64).item() < torch.finfo(torch.float32).max / 2:
        raise LoadError(
            f"tensor {recipe.name!r}: a device has computed values that are not finite, where the host's are; please "
            "report this, with what `python -m loadtests.device_check --stage 1` prints"
        )
