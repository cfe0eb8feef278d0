"""What one tensor is computed from, and how its elements come out of files. The formula is in :mod:`.formula`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch

from expo_serve import kernels
from expo_serve.checkpoint.records import Operand, TensorRecord
from expo_serve.errors import ExpoError
from expo_serve.load import dither
from expo_serve.load.dtypes import TORCH_DTYPES
from expo_serve.load.reader import Buffer, Reader
from expo_serve.load.selection import FileSpan, Selection

if TYPE_CHECKING:
    from expo_serve.load.streaming import Streamed  # numba takes a quarter of a second to import

Memory = Callable[[Operand, int], Buffer]
"""Returns memory for that many bytes of an operand."""


class Operands(Protocol):
    """The operands of one tensor, as :func:`~expo_serve.plan.plan.operands_used` chooses them."""

    @property
    def grain(self) -> int:
        """Number of elements that are best read together: copies are cut at multiples of it."""

    @property
    def dtypes(self) -> Mapping[Operand, torch.dtype]:
        """The dtypes of what :meth:`read` returns."""

    @property
    def widest(self) -> int:
        """Bytes of one element of the operand with the larger ones."""

    def spans(self, selection: Selection) -> list[FileSpan]:
        """Return the spans of files that contiguous elements need; none for other selections."""

    def read_bytes(self, selection: Selection) -> Mapping[str, int]:
        """Return the bytes that reading these elements asks of storage, by source. Called once for what was read."""

    def read(self, selection: Selection, memory: Memory) -> dict[Operand, torch.Tensor]:
        """Read the elements of each operand into the memory given.

        Raises:
            ExpoError: a file cannot be read, or holds what it must not.
        """

    def fill_prefix(self, dest: torch.Tensor, selection: Selection, alpha: float, dither_key: int | None) -> int:
        """Read and combine as many elements as the compiled loops can, from the first one on.

        This is the fast path. It returns early, without raising, at any anomaly (a short read, a value that is
        not finite, loops that are not available): the caller goes on from there by :meth:`read`, which reports the
        cause.

        Args:
            dest: bf16, on the CPU, contiguous, not empty.
            selection: contiguous elements.
            alpha: the extrapolation factor.
            dither_key: see :class:`Recipe`.

        Returns:
            The number of elements that are done.
        """


@dataclass(frozen=True)
class Recipe:
    """How the elements of one tensor are computed."""

    operands: Operands
    dtype: torch.dtype
    """The dtype to which the result is rounded."""
    alpha: float
    fail: Callable[[str], ExpoError] | None
    """Builds the exception for a value that is not finite, given the culprit (an operand's name, or ``result``). None
    turns the check off: masks may hold minus infinity."""
    name: str = ""
    """The tensor's name."""
    is_extrapolated: bool = False
    """False for a result that is copied from one operand."""
    dither_key: int | None = None
    """The tensor's key for dithered rounding, see :meth:`~expo_serve.config.Rounding.key`; None rounds to nearest, as
    for results that are copied, or wider than 16 bits."""

    def noise(self, selection: Selection, device: torch.device) -> torch.Tensor | None:
        """Return the random bits of these elements, see :func:`~expo_serve.load.dither.noise`; None for nearest."""
        return None if self.dither_key is None else dither.noise(selection, self.dither_key, device)


@dataclass(frozen=True)
class RecordOperands:
    """Operands that are stored in checkpoints as they are.

    Args:
        reader: opens their files.
        records: where each operand is stored.
        sources: the source to which each operand's bytes are counted.
    """

    reader: Reader
    records: Mapping[Operand, TensorRecord]
    sources: Mapping[str, str]
    grain: int = 1

    @property
    def dtypes(self) -> Mapping[Operand, torch.dtype]:
        """Return the dtypes as stored."""
        return {operand: TORCH_DTYPES[record.dtype] for operand, record in self.records.items()}

    @property
    def widest(self) -> int:
        """Bytes of one element of the operand with the larger ones."""
        return max(record.itemsize for record in self.records.values())

    def spans(self, selection: Selection) -> list[FileSpan]:
        """Return one span for each operand."""
        if not selection.is_contiguous:
            return []
        return [self.reader.span_of(operand, record, selection) for operand, record in self.records.items()]

    def read_bytes(self, selection: Selection) -> Mapping[str, int]:
        """Count every stored element of each operand."""
        total: Counter[str] = Counter()
        for operand, record in self.records.items():
            total[self.sources[operand]] += selection.stored * record.itemsize
        return total

    def read(self, selection: Selection, memory: Memory) -> dict[Operand, torch.Tensor]:
        """Read the elements of each operand."""
        return {
            operand: self.reader.read_into(record, selection, memory(operand, selection.numel * record.itemsize))
            for operand, record in self.records.items()
        }

    def fill_prefix(self, dest: torch.Tensor, selection: Selection, alpha: float, dither_key: int | None) -> int:
        """Compute nothing: :meth:`streamed` describes what the compiled loop can compute, of many blocks at once."""
        return 0

    def streamed(
        self, dest: torch.Tensor, selection: Selection, alpha: float, dither_key: int | None
    ) -> Streamed | None:
        """Describe elements for :func:`~expo_serve.load.streaming.stream_all`; None where it cannot compute them.

        Args:
            dest: see :meth:`fill_prefix`, as for those that follow.
            selection: the same.
            alpha: the same.
            dither_key: the same.
        """
        if self._other is None or not kernels.available("bf16.combine", "reading.stream"):
            return None
        from expo_serve.kernels.bf16 import lerp_factor
        from expo_serve.load.streaming import Streamed

        is_delta = self._other == "delta"
        factor, from_other = (1 + alpha, False) if is_delta else lerp_factor(1 + alpha)
        one, two = (self.reader.span_of(side, self.records[side], selection) for side in ("base", self._other))
        return Streamed(dest, one, two, selection.offset, factor, from_other, is_delta, dither_key)

    @cached_property
    def _other(self) -> Operand | None:
        """The operand beside base, if both are bf16."""
        if len(self.records) != 2 or {record.dtype for record in self.records.values()} != {"BF16"}:
            return None
        return "delta" if "delta" in self.records else "aligned"
