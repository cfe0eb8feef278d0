"""The product of two thin matrices, computed where it is used: never whole, and added in the same pass for bf16.

Every element is one chain of fused multiply-adds over the rank, in order, whatever the tile that it is computed in: a
block, a shard or a view of the product has the bits of the whole. A library's matrix product does not promise that, and
would write the product (twice the size of what it changes) to memory and read it again.

The loop: a panel of columns of the right factor stays near the core, a few rows at a time go through it, and their sums
stay in registers over the whole rank. One core of an AMD EPYC with AVX-512 does 70 GFLOP/s at rank 16 and 50 at rank 8,
addition included; torch's product alone did 14 to 64 there, by shape.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from expo_serve.kernels.low_rank_ir import source
from expo_serve.kernels.native import compiled, once

_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURE = ctypes.CFUNCTYPE(ctypes.c_bool, *(_POINTER, _SIZE) * 4, *(_SIZE,) * 3, _FLOAT, _FLOAT)
_SIGNATURES = {
    "product": _SIGNATURE,
    "stream": ctypes.CFUNCTYPE(
        _SIZE, ctypes.c_int, _SIZE, _POINTER, *(_POINTER, _SIZE) * 2, *(_SIZE,) * 3, _FLOAT, _FLOAT, _SIZE
    ),
}
STREAM_BYTES = 1 << 18
"""Read before the product is added: it stays in the second cache."""


@dataclass(frozen=True)
class Factors:
    """``scale * left @ right``. fp32, contiguous: left is rows by rank, right rank by columns."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float

    @property
    def columns(self) -> int:
        """Of the product."""
        return self.right.shape[1]

    def product(self, rows: range, columns: range, out: torch.Tensor) -> None:
        """A part of the product.

        Args:
            rows: which.
            columns: which.
            out: fp32, contiguous, of these sizes.
        """
        shape = len(rows), len(columns)
        if loops := low_rank():
            loops.product(self._left(rows), self._right(columns), self._sizes(shape), self.scale, out)
            return
        left, right = self.left[rows.start : rows.stop].double(), self.right[:, columns.start : columns.stop].double()
        out.view(shape).copy_((left @ right).float() * self.scale)

    def stream(self, file: int, offset: int, rows: range, values: torch.Tensor, weight: float) -> int:
        """Read whole rows of bf16 onto their place and add there ``weight`` times the product.

        Args:
            file: a descriptor.
            offset: where in it the first row begins.
            rows: which.
            values: where they belong, contiguous.
            weight: 1 + alpha.

        Returns:
            How many rows are done; fewer where a read gave less than was asked, or a value is not finite.
        """
        loops = low_rank()
        assert loops is not None
        step = max(1, STREAM_BYTES // (2 * self.columns))
        sizes = self._sizes((len(rows), self.columns))
        place = file, offset, values.data_ptr()
        factors = *self._left(rows), *self._right(range(1))
        return int(loops.stream(*place, *factors, *sizes, self.scale, weight, step))

    def _left(self, rows: range) -> tuple[int, int]:
        rank = self.left.shape[1]
        return self.left.data_ptr() + 4 * rows.start * rank, rank

    def _right(self, columns: range) -> tuple[int, int]:
        return self.right.data_ptr() + 4 * columns.start, self.columns

    def _sizes(self, shape: tuple[int, int]) -> tuple[int, int, int]:
        return (*shape, self.left.shape[1])


class LowRank:
    """The compiled loops; matrices come as an address and the elements from row to row."""

    def __init__(self, functions: dict[str, Callable[..., Any]]) -> None:
        self._product, self.stream = functions["product"], functions["stream"]

    def product(
        self,
        left: tuple[int, int],
        right: tuple[int, int],
        sizes: tuple[int, int, int],
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """See :meth:`Factors.product`."""
        there = out.data_ptr(), sizes[1]
        self._product(*there, *there, *left, *right, *sizes, scale, 0.0)


@once
def low_rank() -> LowRank | None:
    """The loops, or None where they cannot be compiled; compiled once in a process."""
    try:
        text = source()
    except ImportError:
        return None
    functions = compiled(text, _SIGNATURES)
    return LowRank(functions) if functions else None
