"""Effective alpha of a load, from a sample of what it computes."""

from __future__ import annotations

import threading
import zlib
from collections import defaultdict

import torch

from expo_serve.config import Rounding
from expo_serve.load.operands import Recipe
from expo_serve.load.reader import Reader
from expo_serve.load.selection import Selection
from expo_serve.measure.tally import Tally, tally

_SHARE = 256
"""One byte in so many is sampled: costs less than a hundredth of a load."""
_LEAST_BYTES, _MOST_BYTES = 4 << 20, 64 << 20
"""Bounds of a sample, in bytes of the result: small models are sampled almost whole."""
_PART_VALUES = 1 << 16
"""Values sampled together: reading and counting take longer than calling for them does."""


class Sample:
    """Measures a part of what a load computes, a fixed one for each way of cutting the load into blocks.

    Args:
        share: how much to sample, from 0 to 1; see :meth:`of_load`.
        rounding: that of the load.
    """

    def __init__(self, share: float, rounding: Rounding) -> None:
        self.share = share
        self._method = rounding.method
        self._tallies: dict[float, Tally] = defaultdict(Tally)
        self._lock = threading.Lock()

    @classmethod
    def of_load(cls, weight_bytes: int, rounding: Rounding) -> Sample:
        """Return a sample for a load of so many bytes, small beside the load."""
        size = min(max(weight_bytes // _SHARE, _LEAST_BYTES), _MOST_BYTES)
        return cls(min(1.0, size / max(1, weight_bytes)), rounding)

    def __call__(self, recipe: Recipe, block: Selection, reader: Reader) -> None:
        """Measure a part of a block, or none of it; safe from any thread.

        Args:
            recipe: how the block was computed.
            block: its elements.
            reader: reads the part again, most likely from the page cache.
        """
        if not recipe.is_extrapolated or not (parts := self._parts(recipe, block)):
            return
        found = Tally()
        for part in parts:
            with torch.no_grad():
                operands = recipe.operands.read(part, reader.buffer)
                noise = recipe.noise(part, torch.device("cpu"))
                found.add(tally(operands, recipe.dtype, recipe.alpha, noise))
        weight = block.numel / sum(part.numel for part in parts)
        with self._lock:
            self._tallies[recipe.alpha].add(found, weight * self._weight(block))

    @property
    def step_squares(self) -> dict[float, float]:
        """By alpha: the sum of the squares of the step, estimated for everything."""
        return {alpha: tally.step_squares for alpha, tally in self._tallies.items()}

    def effective_alpha(self, alpha: float) -> float | None:
        """Return the effective alpha of the tensors with this alpha; None where nothing changed.

        At alpha 0 and -1 it is alpha itself: there bits are copied, and a delta is rounded to where alpha 0 is.
        """
        if alpha in (0, -1):
            return alpha
        return self._tallies[alpha].effective_alpha(self._method) if alpha in self._tallies else None

    def _chance(self, block: Selection) -> float:
        """Return how likely a block is sampled at all: small blocks are sampled whole or not."""
        return min(1.0, block.numel * self.share / min(block.numel, _PART_VALUES))

    def _weight(self, block: Selection) -> float:
        return 1 / self._chance(block)

    def _parts(self, recipe: Recipe, block: Selection) -> list[Selection]:
        """Choose the elements to measure: contiguous along the outer dimensions, at a place that a hash gives."""
        draw = zlib.crc32(f"{recipe.name}:{block.offset}:{block.shape}".encode()) / 2**32
        chance = self._chance(block)
        if draw >= chance or not block.numel:
            return []
        wanted = min(block.numel, max(_PART_VALUES, round(block.numel * self.share)))
        return [_part(block, wanted, recipe.operands.grain, draw / chance)]


def _part(block: Selection, wanted: int, grain: int, draw: float) -> Selection:
    """Return about ``wanted`` elements of a block, from the ``draw``-th part of it on; whole grains where there are."""
    while block.numel > wanted and max(block.shape) > 1:
        dim = block.outer_dim
        size = block.shape[dim]
        each = block.numel // size
        length = min(size, max(1, wanted // each))
        start = int(draw * (size - length + 1))
        if each == 1 and grain > 1 and size > grain:
            first = -block.offset % grain
            start = min(first + start // grain * grain, size - length)
        block = block.narrow(dim, start, length)
        if each <= wanted:
            break
    return block
