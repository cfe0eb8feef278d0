"""Effective alpha of a load, from a sample of what it computes."""

from __future__ import annotations

import math
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch

from expo_serve.checkpoint.records import Operand
from expo_serve.config import Rounding
from expo_serve.errors import LoadError
from expo_serve.load.device_queue import Mark, copied_to
from expo_serve.load.operands import Recipe
from expo_serve.load.reader import Reader
from expo_serve.load.selection import Selection
from expo_serve.load.session import Written
from expo_serve.measure.tally import projection, tally
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
        self._on_device: list[_OnDevice] = []
        self._lock = threading.Lock()

    @classmethod
    def of_load(cls, weight_bytes: int, rounding: Rounding) -> Sample:
        """Return a sample for a load of so many bytes, small beside the load."""
        size = min(max(weight_bytes // _SHARE, _LEAST_BYTES), _MOST_BYTES)
        return cls(min(1.0, size / max(1, weight_bytes)), rounding)

    def __call__(self, recipe: Recipe, block: Selection, reader: Reader, written: Written | None = None) -> None:
        """Measure a part of a block, or nothing; safe from any thread.

        What a device has computed is measured there, and nothing waits for that. On the CPU a part is computed again.

        Args:
            recipe: how the block was computed.
            block: its elements.
            reader: reads the part again, most likely from the page cache.
            written: the result, where a device has computed it.
        """
        if not recipe.is_extrapolated or not block.numel:
            return
        draw = zlib.crc32(f"{recipe.name}:{block.offset}:{block.shape}".encode()) / 2**32
        wanted = min(block.numel, max(_PART_VALUES, round(block.numel * self._share)))
        chance = min(1.0, block.numel * self._share / wanted)
        if draw >= chance:
            return
        values = written.values if written and written.values.dtype == recipe.dtype else None
        part, values = _part(block, values, wanted, recipe.operands.grain, draw / chance)
        weight = block.numel / part.numel / chance
        with torch.no_grad():
            operands = recipe.operands.read(part, reader.buffer)
            if written and values is not None:
                with suppress(torch.OutOfMemoryError, LoadError):  # a device that is full has no room for statistics
                    self._on_device.append(_OnDevice.of(operands, values, written.run, recipe.alpha, weight))
                return
            noise = recipe.noise(part, torch.device("cpu"))
            found = tally(operands, recipe.dtype, recipe.alpha, noise, self._method)
        with self._lock:
            self._parts[recipe.alpha].append((weight * found.moved[self._method], weight * found.step_squares))

    def effective_alpha(self, alpha: float) -> EffectiveAlpha:
        """Return the effective alpha of the tensors with this alpha.

        At alpha 0 and -1 it is alpha: there the bits of one side are copied, or alpha 0 is what is rounded to.
        """
        self._bring()
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

    def _bring(self) -> None:
        """Wait for what is measured on devices."""
        while self._on_device:
            one = self._on_device.pop()
            one.mark.wait()
            moved, squares = one.sums.tolist()
            self._parts[one.alpha].append((one.weight * moved, one.weight * squares))


@dataclass(frozen=True)
class _OnDevice:
    """A part that is measured on a device."""

    alpha: float
    weight: float
    sums: torch.Tensor
    """fp64, there, see :func:`~expo_serve.measure.tally.projection`."""
    mark: Mark

    @classmethod
    def of(
        cls,
        operands: Mapping[Operand, torch.Tensor],
        values: torch.Tensor,
        run: Callable[[Callable[[], None]], Mark],
        alpha: float,
        weight: float,
    ) -> _OnDevice:
        """Let a device measure what is in its memory.

        Args:
            operands: of the part, on the CPU.
            values: of the part, there.
            run: enqueues work there.
            alpha: of the part.
            weight: of what is found.
        """
        there = {side: copied_to(values.device, operand) for side, operand in operands.items()}
        sums = torch.empty(2, dtype=torch.float64, device=values.device)

        def measure() -> None:
            sums.copy_(projection(values, there))

        return cls(alpha, weight, sums, run(measure))


def _part(
    block: Selection, values: torch.Tensor | None, wanted: int, grain: int, draw: float
) -> tuple[Selection, torch.Tensor | None]:
    """Return about ``wanted`` elements of a block, beginning at the ``draw``-th part of it.

    Args:
        block: more elements, most often.
        values: those elements, of which the same part is returned.
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
        values = values.narrow(dim, start, length) if values is not None else None
        if length > 1:
            break
    return block, values
