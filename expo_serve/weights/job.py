"""One copy out of a checkpoint: what is read, how it is combined, and doing it on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from expo_serve.errors import ExpoError
from expo_serve.weights.ahead import FileRange
from expo_serve.weights.elements import Elements, cut
from expo_serve.weights.extrapolate import NotFiniteError, Side, combine_into, combine_unchecked
from expo_serve.weights.fused import STREAM_PIECE_BYTES, fused
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

    def ranges(self, elements: Elements) -> list[FileRange]:
        """The bytes that lie one behind the other in the files; none for elements that do not."""
        if not elements.is_contiguous:
            return []
        return [self.reader.range_of(side, record, elements) for side, record in self.records.items()]


def fill_here(dest: torch.Tensor, elements: Elements, job: Job) -> None:
    """Read and combine elements into ``dest`` piece by piece, so that each is still in the cache when it is combined.

    Raises:
        CheckpointError: a file cannot be read.
        ExpoError: a value is not finite, as the job says it.
    """
    dest, elements = _stream(dest, elements, job)
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


def _stream(dest: torch.Tensor, elements: Elements, job: Job) -> tuple[torch.Tensor, Elements]:
    """Do what the compiled loop can do; returns what it leaves, most often nothing."""
    is_plain = len(job.records) == 2 and dest.is_cpu and dest.is_contiguous() and elements.is_contiguous
    dtypes = {record.dtype for record in job.records.values()}
    if not (is_plain and dtypes == {"BF16"} and dest.dtype == torch.bfloat16 and dest.numel() and (loops := fused())):
        return dest, elements
    with job.reader.placed(job.records, elements, STREAM_PIECE_BYTES) as places:
        size = loops.stream(places["base"], places["aligned"], dest, 1 + job.alpha)
    job.reader.activity.add_bytes(2 * size)
    done = size // dest.element_size()
    return dest.view(-1)[done:], Elements((dest.numel() - done,), (1,), elements.offset + done)
