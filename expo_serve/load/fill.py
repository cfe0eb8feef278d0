"""One copy out of a checkpoint: what is read, how it is combined, and doing it on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from expo_serve.errors import ExpoError
from expo_serve.load.formula import NotFiniteError, combine_into, combine_unchecked
from expo_serve.load.operands import Sides
from expo_serve.load.reader import PIECE_BYTES, Reader
from expo_serve.load.selection import Elements, cut


@dataclass(frozen=True)
class Job:
    """What one copy needs besides its elements: the sides that are read, and how they are combined."""

    sides: Sides
    reader: Reader
    dtype: torch.dtype
    """What the result is rounded to."""
    alpha: float
    fail: Callable[[str], ExpoError] | None
    """Makes the error out of whose fault it is: a side or ``result``. None: values may be infinite."""


def fill_here(dest: torch.Tensor, elements: Elements, job: Job) -> None:
    """Read and combine elements into ``dest`` piece by piece, so that each is still in the cache when it is combined.

    Raises:
        CheckpointError: a file cannot be read.
        ExpoError: a value is not finite, as the job says it.
    """
    dest, elements = _stream(dest, elements, job)
    with torch.no_grad():
        for out, piece in cut(dest, elements, PIECE_BYTES // job.sides.widest, job.sides.grain):
            operands = job.sides.read(piece, job.reader.buffer)
            if job.fail is None:
                combine_unchecked(out, operands, job.dtype, job.alpha)
                continue
            try:
                combine_into(out, operands, job.dtype, job.alpha)
            except NotFiniteError as error:
                raise job.fail(str(error)) from None


def _stream(dest: torch.Tensor, elements: Elements, job: Job) -> tuple[torch.Tensor, Elements]:
    """Do what compiled loops can do; returns what they leave, most often nothing."""
    is_plain = dest.is_cpu and dest.is_contiguous() and elements.is_contiguous and dest.numel()
    if not (is_plain and dest.dtype == job.dtype == torch.bfloat16 and job.fail):
        return dest, elements
    done = job.sides.stream(dest, elements, job.alpha)
    return dest.view(-1)[done:], Elements((dest.numel() - done,), (1,), elements.offset + done)
