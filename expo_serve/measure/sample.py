"""Effective alpha of a load, from a sample of what it computes."""

from __future__ import annotations

import math
import threading
import zlib
from collections import defaultdict

import torch

from expo_serve.config import Rounding
from expo_serve.load.operands import Recipe
from expo_serve.load.reader import Reader
from expo_serve.load.selection import Selection
from expo_serve.measure.tally import tally
from expo_serve.report import EffectiveAlpha

_SHARE = 512
"""One value in so many is sampled: that costs about a hundredth of a load."""
_LEAST_BYTES, _MOST_BYTES = 4 << 20, 64 << 20
"""Bounds of a sample, in bytes of the result: small models are sampled almost whole."""
_PART_VALUES = 1 << 16
"""Values sampled together: less would take Python longer than reading and counting them."""


class Sample:
    """Measures a part of what a load computes: blocks, and places in them, that a hash chooses.

    Args:
        share: how much of the values to sample, up to 1; see :meth:`of_load`.
        rounding: that of the load.
    """

    def __init__(self, share: float, rounding: Rounding) -> None:
        self._share = share
        self._method = rounding.method
        self._parts: dict[float, list[tuple[float, float]]] = defaultdict(list)
        """By alpha: of each part what was moved along the step and the square of the step, both weighted."""
        self._lock = threading.Lock()

    @classmethod
    def of_load(cls, weight_bytes: int, rounding: Rounding) -> Sample:
        """Return a sample for a load of so many bytes, small beside the load."""
        size = min(max(weight_bytes // _SHARE, _LEAST_BYTES), _MOST_BYTES)
        return cls(min(1.0, size / max(1, weight_bytes)), rounding)

    def __call__(self, recipe: Recipe, block: Selection, reader: Reader) -> None:
        """Measure a part of a block, or nothing; safe from any thread.

        Args:
            recipe: how the block was computed.
            block: its elements.
            reader: reads the part again, most likely from the page cache.
        """
        if not recipe.is_extrapolated or not block.numel:
            return
        draw = zlib.crc32(f"{recipe.name}:{block.offset}:{block.shape}".encode()) / 2**32
        wanted = min(block.numel, max(_PART_VALUES, round(block.numel * self._share)))
        chance = min(1.0, block.numel * self._share / wanted)
        if draw >= chance:
            return
        part = _part(block, wanted, recipe.operands.grain, draw / chance)
        with torch.no_grad():
            operands = recipe.operands.read(part, reader.buffer)
            noise = recipe.noise(part, torch.device("cpu"))
            found = tally(operands, recipe.dtype, recipe.alpha, noise, self._method)
        weight = block.numel / part.numel / chance
        with self._lock:
            self._parts[recipe.alpha].append((weight * found.moved[self._method], weight * found.step_squares))

    def effective_alpha(self, alpha: float) -> EffectiveAlpha:
        """Return the effective alpha of the tensors with this alpha.

        At alpha 0 and -1 it is alpha: there the bits of one side are copied, or alpha 0 is what is rounded to.
        """
        parts = self._parts.get(alpha, [])
        total = sum(step for _, step in parts)
        if alpha in (0, -1):
            return EffectiveAlpha(value=alpha, step_squares=total)
        if not total:
            return EffectiveAlpha(value=None)
        value = sum(moved for moved, _ in parts) / total
        # Of a ratio of sums over a sample; nothing is left open where everything was measured.
        error = 0.0 if self._share >= 1 else math.hypot(*(moved - value * step for moved, step in parts)) / total
        return EffectiveAlpha(value=value, standard_error=error, step_squares=total)


def _part(block: Selection, wanted: int, grain: int, draw: float) -> Selection:
    """Return about ``wanted`` elements of a block, beginning at the ``draw``-th part of it.

    Args:
        block: more elements, most often.
        wanted: how many are wanted; single rows of the outer dimensions may have more.
        grain: elements that are best read together.
        draw: from 0 to 1.
    """
    while block.numel > wanted:
        dim = block.outer_dim
        size = block.shape[dim]
        each = block.numel // size
        length = max(1, wanted // each)
        start = min(size - length, int(draw * (size - length + 1)))
        if each == 1 and block.stride[dim] == 1 and start:
            start = max(0, start - (block.offset + start) % grain)
        block = block.narrow(dim, start, length)
        if length > 1:
            break
    return block
