"""A packed delta on its way onto a device: base's blocks, and beside them which of their values change to what.

The host has to see base's bytes, since it checks that they are those that the delta was made against, and it
decompresses the changes. What goes to the device is base and a few percent of places and values, instead of two whole
operands; there they are put in, and both operands are combined as those of a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from expo_serve.checkpoint.records import Operand
from expo_serve.load.formula import combine_unchecked
from expo_serve.load.operands import Recipe
from expo_serve.load.packed import PackedOperands
from expo_serve.load.selection import Selection
from expo_serve.load.threads import Task
from expo_serve.load.transfer import aligned

_PLACE = torch.int32
_ALL = -1
"""In place of a number of changes: all values of aligned are there instead."""


class PackedTransfer:
    """Contiguous elements of a tensor, and the blocks that cover them.

    In memory, base's values of all blocks come first. Behind them each block has as much room again, for the places of
    its changes (int32) and their values, or for all of its values where those take less.

    Args:
        recipe: how they are computed.
        selection: which.
    """

    def __init__(self, recipe: Recipe, selection: Selection) -> None:
        assert isinstance(recipe.operands, PackedOperands)
        self.recipe, self.selection = recipe, selection
        self._operands, self._dtype = recipe.operands, recipe.dtype
        self._blocks = self._operands.blocks(selection)
        self._start, end = self._operands.ends(self._blocks)
        self._numel = end - self._start
        self._half = aligned(self._numel * self._dtype.itemsize)
        self._counts: dict[int, int] = {}
        """By block: how many of its values change."""

    @property
    def size(self) -> int:
        return 2 * self._half

    def reads(self, host: torch.Tensor, threads: int) -> Sequence[Task]:
        return [partial(self._read, block, host) for block in self._blocks]

    def _read(self, block: int, host: torch.Tensor) -> None:
        base, room = self._base(block, host), self._room(block, host)
        self._operands.read_base(block, base)
        changes = self._operands.read_changes(block, base, room.view(self._dtype), self._capacity(block))
        if changes is None:
            self._counts[block] = _ALL
            return
        places, values = (torch.from_numpy(one) for one in changes)
        self._counts[block] = len(places)
        if not len(places):
            return
        for there, here in zip(self._changes(block, host), (places, values.view(self._dtype)), strict=True):
            there.copy_(here)

    def _place(self, block: int) -> slice:
        """Return where the values of a block are among those of all blocks."""
        first, end = self._operands.ends(range(block, block + 1))
        return slice(first - self._start, end - self._start)

    def _base(self, block: int, memory: torch.Tensor) -> torch.Tensor:
        return memory[: self._numel * self._dtype.itemsize].view(self._dtype)[self._place(block)]

    def _room(self, block: int, memory: torch.Tensor) -> torch.Tensor:
        place, width = self._place(block), self._dtype.itemsize
        return memory[self._half + place.start * width : self._half + place.stop * width]

    def _capacity(self, block: int) -> int:
        place, width = self._place(block), self._dtype.itemsize
        is_aligned = (self._half + place.start * width) % _PLACE.itemsize == 0
        return (place.stop - place.start) * width // (_PLACE.itemsize + width) if is_aligned else 0

    def _changes(self, block: int, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the memory for the places and the values of a block's changes."""
        room, middle = self._room(block, memory), self._counts[block] * _PLACE.itemsize
        end = middle + self._counts[block] * self._dtype.itemsize
        return room[:middle].view(_PLACE), room[middle:end].view(self._dtype)

    def ranges(self) -> Sequence[tuple[int, int]]:
        return [(0, self._numel * self._dtype.itemsize), *(self._used(block) for block in self._blocks)]

    def _used(self, block: int) -> tuple[int, int]:
        place, count, width = self._place(block), self._counts[block], self._dtype.itemsize
        start = self._half + place.start * width
        return start, start + (
            (place.stop - place.start) * width if count == _ALL else count * (_PLACE.itemsize + width)
        )

    def combine(self, out: torch.Tensor, device: torch.Tensor) -> torch.Tensor:
        recipe, selection = self.recipe, self.selection
        base = device[: self._numel * self._dtype.itemsize].view(self._dtype)
        changed = base.clone()
        for block, count in self._counts.items():
            self._change(changed[self._place(block)], block, count, device)
        wanted = slice(selection.offset - self._start, selection.end - self._start)
        operands: dict[Operand, torch.Tensor] = {
            "base": base[wanted].view(selection.shape),
            "aligned": changed[wanted].view(selection.shape),
        }
        return combine_unchecked(out, operands, recipe.dtype, recipe.alpha, recipe.noise(selection, out.device))

    def _change(self, values: torch.Tensor, block: int, count: int, device: torch.Tensor) -> None:
        """Enqueue what turns base's values of a block into those of aligned."""
        if count == _ALL:
            values.copy_(self._room(block, device).view(self._dtype))
        elif count:
            places, new = self._changes(block, device)
            values.index_copy_(0, places.long(), new)
