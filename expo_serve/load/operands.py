"""What one tensor is computed from: how any of its elements come out of files. No formula here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from expo_serve.checkpoint.records import Operand, TensorRecord
from expo_serve.kernels.bf16 import STREAM_PIECE_BYTES, fused
from expo_serve.load.read_ahead import FileSpan
from expo_serve.load.reader import Buffer, Reader
from expo_serve.load.selection import Selection

Memory = Callable[[Operand, int], Buffer]
"""Gives memory for so many bytes of a side."""


class Operands(Protocol):
    """The sides that a result is computed from, as :func:`~expo_serve.plan.plan.operands_used` names them."""

    @property
    def grain(self) -> int:
        """Selection that are best read together: copies are cut at multiples of it."""

    @property
    def widest(self) -> int:
        """Bytes of one element of the side with the larger ones."""

    def ranges(self, elements: Selection) -> list[FileSpan]:
        """The bytes of files that elements which lie one behind the other need; none where they do not."""

    def read_bytes(self, elements: Selection) -> Mapping[str, int]:
        """Bytes that reading these elements asks of storage, by source. Called once for what was read."""

    def read(self, elements: Selection, memory: Memory) -> dict[Operand, torch.Tensor]:
        """The elements of each side, in the memory given.

        Raises:
            ExpoError: a file cannot be read, or holds what it must not.
        """

    def stream(self, dest: torch.Tensor, elements: Selection, alpha: float) -> int:
        """Read and combine in one go as much as can be, from the first element on.

        Args:
            dest: bf16, on the CPU, contiguous, with elements.
            elements: one behind the other.
            alpha: how far.

        Returns:
            How many elements are done; whatever is not as it should be is left for :meth:`read` to say.
        """


@dataclass(frozen=True)
class RecordOperands:
    """Operands that lie in checkpoints as they are.

    Args:
        reader: opens their files.
        records: where each side lies.
        sources: of which source each side's bytes are.
    """

    reader: Reader
    records: Mapping[Operand, TensorRecord]
    sources: Mapping[str, str]
    grain: int = 1

    @property
    def widest(self) -> int:
        """See :class:`Operands`."""
        return max(record.itemsize for record in self.records.values())

    def ranges(self, elements: Selection) -> list[FileSpan]:
        """See :class:`Operands`."""
        if not elements.is_contiguous:
            return []
        return [self.reader.range_of(side, record, elements) for side, record in self.records.items()]

    def read_bytes(self, elements: Selection) -> Mapping[str, int]:
        """See :class:`Operands`."""
        total: Counter[str] = Counter()
        for side, record in self.records.items():
            total[self.sources[side]] += elements.stored * record.itemsize
        return total

    def read(self, elements: Selection, memory: Memory) -> dict[Operand, torch.Tensor]:
        """See :class:`Operands`."""
        return {
            side: self.reader.read_into(record, elements, memory(side, elements.numel * record.itemsize))
            for side, record in self.records.items()
        }

    def stream(self, dest: torch.Tensor, elements: Selection, alpha: float) -> int:
        """See :class:`Operands`."""
        other: Operand = "delta" if "delta" in self.records else "aligned"
        dtypes = {record.dtype for record in self.records.values()}
        if len(self.records) != 2 or dtypes != {"BF16"} or not (loops := fused()):
            return 0
        with self.reader.placed(self.records, elements, STREAM_PIECE_BYTES) as places:
            size = loops.stream(places["base"], places[other], dest, 1 + alpha, is_delta=other == "delta")
        self.reader.activity.add_bytes(2 * size)
        return size // dest.element_size()
