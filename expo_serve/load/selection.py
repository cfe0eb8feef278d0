"""Which elements of a stored tensor (:class:`Selection`), and which bytes of which file (:class:`FileSpan`).

What a view of a lazy tensor selects and the pieces that a copy is cut into are selections: a few integers for each
piece instead of a tensor on the meta device.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FileSpan:
    """Contiguous bytes of an open file, which belong to one operand."""

    operand: str
    path: Path
    descriptor: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.offset + self.length

    def is_cached(self) -> bool:
        """Return True if the last byte is in the page cache, and so most likely all that precede it.

        True also where the system cannot tell.
        """
        try:
            os.preadv(self.descriptor, [bytearray(1)], self.end - 1, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except (OSError, AttributeError):  # the file system, or the platform, does not know the flag
            return True
        return True


@dataclass(frozen=True, slots=True)
class Selection:
    """Elements of a row-major tensor. Strides and offset count elements, as torch's do."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, view: torch.Tensor) -> Selection:
        """Return what a view selects of its storage."""
        return cls(tuple(view.shape), view.stride(), int(view.storage_offset()))

    @classmethod
    def flat(cls, start: int, count: int) -> Selection:
        """Select ``count`` contiguous elements, from element ``start`` on."""
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
        """One past the last element; the offset if there are none."""
        return self.offset + span(self.shape, self.stride)

    @property
    def is_contiguous(self) -> bool:
        """True if the elements are contiguous in the file, in order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def outer_dim(self) -> int:
        """The dimension along which neighbours are farthest apart."""
        return max(range(len(self.shape)), key=lambda dim: (self.shape[dim] > 1, self.stride[dim]))

    @property
    def extent(self) -> int:
        """Elements in a row that are contiguous in the file; for dimensions in file order (:meth:`in_file_order`)."""
        extent = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != extent:
                break
            extent *= size
        return extent

    def narrow(self, dim: int, start: int, length: int) -> Selection:
        """Take a part along a dimension, as :meth:`torch.Tensor.narrow` does."""
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        return replace(self, shape=shape, offset=self.offset + start * self.stride[dim])

    def select(self, dim: int, index: int) -> Selection:
        """Take one index of a dimension, as :meth:`torch.Tensor.select` does."""
        without = (*self.shape[:dim], *self.shape[dim + 1 :]), (*self.stride[:dim], *self.stride[dim + 1 :])
        return Selection(*without, self.offset + index * self.stride[dim])

    def halves(self) -> tuple[int, list[tuple[int, int]]]:
        """Return the outermost dimension, and start and length of its two halves, to :meth:`narrow` by."""
        dim = self.outer_dim
        half = self.shape[dim] // 2
        return dim, [(0, half), (half, self.shape[dim] - half)]

    def in_file_order(self) -> tuple[Selection, tuple[int, ...]]:
        """Order the dimensions from the widest stride to the narrowest, and take repeated elements once.

        Returns:
            The ordered selection, and the position of each of this selection's dimensions in it.
        """
        sizes = [1 if stride == 0 else size for size, stride in zip(self.shape, self.stride, strict=True)]
        order = sorted(range(len(sizes)), key=lambda dim: self.stride[dim], reverse=True)
        ordered = Selection(
            tuple(sizes[dim] for dim in order), tuple(self.stride[dim] for dim in order), self.offset
        )  # fmt: skip
        return ordered, tuple(order.index(dim) for dim in range(len(order)))

    def extent_starts(self) -> Offsets:
        """Return the element at which each contiguous extent begins; for dimensions in file order."""
        starts, length, extent = np.array([self.offset]), self.numel, self.extent
        for size, step in zip(self.shape, self.stride, strict=True):
            if length <= extent:
                break
            starts = (starts[:, None] + np.arange(size) * step).reshape(-1)
            length //= size
        return starts

    def merged(self) -> Selection:
        """Join neighbouring dimensions where that keeps the elements; for dimensions in file order.

        The last dimension is the contiguous extent. Two selections of the same elements are equal then, but for ways
        of nesting that no parameter has.
        """
        extent = self.extent
        left, shape, stride = self.numel, [], []
        for size, step in zip(self.shape, self.stride, strict=True):
            if left <= extent:
                break
            left //= size
            if size > 1:
                shape.append(size)
                stride.append(step)
        return Selection((*shape, extent), (*stride, 1), self.offset)


def span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Return the elements of a storage from the first to the last that a tensor covers; 0 for an empty tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def cut(
    dest: torch.Tensor, selection: Selection, limit: int, grain: int = 1
) -> Iterator[tuple[torch.Tensor, Selection]]:
    """Cut a copy into pieces of at most ``limit`` elements each, in file order.

    Args:
        dest: where the elements go; same shape.
        selection: what is copied.
        limit: at least 1; raised to ``grain`` where that is more.
        grain: contiguous elements are cut where their index is a multiple of it.
    """
    limit = max(grain, limit - limit % grain)
    numel = selection.numel
    if numel == 0:
        return
    if numel <= limit:
        yield dest, selection
    elif selection.is_contiguous and dest.is_contiguous():
        start, end = selection.offset, selection.offset + numel
        flat = dest.view(-1)
        while start < end:
            stop = min(end, start + limit - start % grain)
            piece = Selection.flat(start, stop - start)
            yield flat[start - selection.offset : stop - selection.offset], piece
            start = stop
    else:
        yield from _cut_outer(dest, selection, limit, grain)


def _cut_outer(
    dest: torch.Tensor, selection: Selection, limit: int, grain: int
) -> Iterator[tuple[torch.Tensor, Selection]]:
    dim = selection.outer_dim
    size = selection.shape[dim]
    row = selection.numel // size
    if row > limit:
        for index in range(size):
            yield from cut(dest.select(dim, index), selection.select(dim, index), limit, grain)
        return
    step = limit // row
    for start in range(0, size, step):
        length = min(step, size - start)
        yield dest.narrow(dim, start, length), selection.narrow(dim, start, length)
