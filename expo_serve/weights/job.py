"""One copy out of a checkpoint: what is read, how it is combined, and doing it on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from expo_serve.errors import ExpoError
from expo_serve.weights.elements import Elements, cut
from expo_serve.weights.extrapolate import NotFiniteError, Side, combine_into, combine_unchecked
from expo_serve.weights.header import DTYPE_BYTES, TensorRecord
from expo_serve.weights.reader import PIECE_BYTES, Reader


@dataclass(frozen=True)
class Job:
    """What one copy needs besides its elements: the sides that are read, and how they are combined."""

    reader: Reader
    records: dict[Side, TensorRecord]
    dtype: torch.dtype
    """The aligned tensor's, which the result is rounded to."""
    alpha: float
    fail: Callable[[str], ExpoError] | None
    """Makes the error out of whose fault it is: ``base``, ``aligned`` or ``result``. None: values may be infinite."""

    @property
    def widest(self) -> int:
        """Bytes of one element of the side with the larger ones."""
        return max(DTYPE_BYTES[record.dtype] for record in self.records.values())


def fill_here(dest: torch.Tensor, elements: Elements, job: Job) -> None:
    """Read and combine elements into ``dest`` piece by piece, so that each is still in the cache when it is combined.

    Raises:
        CheckpointError: a file cannot be read.
        ExpoError: a value is not finite, as the job says it.
    """
    with torch.no_grad():
        for out, piece in cut(dest, elements, PIECE_BYTES // job.widest):
            operands = {side: job.reader.read(record, piece, side) for side, record in job.records.items()}
            if job.fail is None:
                combine_unchecked(out, operands, job.dtype, job.alpha)
                continue
            try:
                combine_into(out, operands, job.dtype, job.alpha)
            except NotFiniteError as error:
                raise job.fail(str(error)) from None
