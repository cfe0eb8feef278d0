"""Which elements of a stored tensor: sizes, strides and an offset, in plain integers.

What a view of a lazy tensor selects, and the pieces that a copy is cut into, are described so: a piece costs a few
integers instead of a tensor on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Selection:
    """A selection of a row-major tensor's elements, counted in elements as torch's strides and offsets are."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, view: torch.Tensor) -> Selection:
        """What a view selects."""
        return cls(tuple(view.shape), view.stride(), int(view.storage_offset()))

    @classmethod
    def flat(cls, start: int, count: int) -> Selection:
        """Select ``count`` elements that are contiguous in the file, from element ``start`` on."""
        return cls((count,), (1,), start)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stored(self) -> int:
        """Number of elements, repeated ones counted once."""
        return math.prod(size for size, stride in zip(self.shape, self.stride, strict=True) if stride or not size)

    @property
    def end(self) -> int:
        """One past the last element; the offset where there is none."""
        return self.offset + span(self.shape, self.stride)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one behind the other, in order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def narrow(self, dim: int, start: int, length: int) -> Selection:
        """See :meth:`torch.Tensor.narrow`."""
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        return replace(self, shape=shape, offset=self.offset + start * self.stride[dim])

    def select(self, dim: int, index: int) -> Selection:
        """See :meth:`torch.Tensor.select`."""
        without = (*self.shape[:dim], *self.shape[dim + 1 :]), (*self.stride[:dim], *self.stride[dim + 1 :])
        return Selection(*without, self.offset + index * self.stride[dim])

    def outer_dim(self) -> int:
        """The dimension along which neighbours lie farthest apart."""
        return max(range(len(self.shape)), key=lambda dim: (self.shape[dim] > 1, self.stride[dim]))


def span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Selection of a storage from the first to the last that a tensor of these sizes covers; 0 for one without any."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def cut(
    dest: torch.Tensor, elements: Selection, limit: int, grain: int = 1
) -> Iterator[tuple[torch.Tensor, Selection]]:
    """Cut a copy into pieces of at most ``limit`` elements each, in the order in which they are stored.

    Args:
        dest: where the elements go; same shape.
        elements: what is copied.
        limit: at least 1; raised to ``grain`` where that is more.
        grain: elements that lie one behind the other are cut where their index is a multiple of it.
    """
    limit = max(grain, limit - limit % grain)
    numel = elements.numel
    if numel == 0:
        return
    if numel <= limit:
        yield dest, elements
    elif elements.is_contiguous and dest.is_contiguous():
        start, end = elements.offset, elements.offset + numel
        flat = dest.view(-1)
        while start < end:
            stop = min(end, start + limit - start % grain)
            yield flat[start - elements.offset : stop - elements.offset], Selection.flat(start, stop - start)
            start = stop
    else:
        yield from _cut_outer(dest, elements, limit, grain)


def _cut_outer(
    dest: torch.Tensor, elements: Selection, limit: int, grain: int
) -> Iterator[tuple[torch.Tensor, Selection]]:
    dim = elements.outer_dim()
    size = elements.shape[dim]
    row = elements.numel // size
    if row > limit:
        for index in range(size):
            yield from cut(dest.select(dim, index), elements.select(dim, index), limit, grain)
        return
    step = limit // row
    for start in range(0, size, step):
        length = min(step, size - start)
        yield dest.narrow(dim, start, length), elements.narrow(dim, start, length)
