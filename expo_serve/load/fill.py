"""One copy out of a checkpoint: what is read, how it is combined, and doing it on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from expo_serve.checkpoint.records import Operand, TensorRecord
from expo_serve.errors import ExpoError
from expo_serve.kernels.bf16 import fused
from expo_serve.kernels.low_rank import low_rank
from expo_serve.kernels.sparse import extrapolating
from expo_serve.load.formula import NotFiniteError, combine_into, combine_unchecked
from expo_serve.load.lora import LowRankOperands
from expo_serve.load.operands import Operands, RecordOperands
from expo_serve.load.packed import PackedOperands
from expo_serve.load.reader import PIECE_BYTES, Reader
from expo_serve.load.selection import Selection, cut
from expo_serve.plan.plan import PlannedTensor
from expo_serve.plan.tensor_deltas import FullTensorDelta, LowRankTensorDelta, PackedTensorDelta


@dataclass(frozen=True)
class Job:
    """What one copy needs besides its elements: the sides that are read, and how they are combined."""

    sides: Operands
    reader: Reader
    dtype: torch.dtype
    """What the result is rounded to."""
    alpha: float
    fail: Callable[[str], ExpoError] | None
    """Makes the error out of whose fault it is: a side or ``result``. None: values may be infinite."""


def fill_here(dest: torch.Tensor, elements: Selection, job: Job) -> None:
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


def _stream(dest: torch.Tensor, elements: Selection, job: Job) -> tuple[torch.Tensor, Selection]:
    """Do what compiled loops can do; returns what they leave, most often nothing."""
    is_plain = dest.is_cpu and dest.is_contiguous() and elements.is_contiguous and dest.numel()
    if not (is_plain and dest.dtype == job.dtype == torch.bfloat16 and job.fail):
        return dest, elements
    done = job.sides.stream(dest, elements, job.alpha)
    return dest.view(-1)[done:], Selection.flat(elements.offset + done, dest.numel() - done)


def operands_of(planned: PlannedTensor, reader: Reader, used: tuple[Operand, ...]) -> Operands:
    """Make what reads a planned tensor's operands.

    Args:
        planned: the tensor.
        reader: opens its files.
        used: the operands that are wanted.
    """
    match planned.delta:
        case None:
            records = {"base": planned.base, "aligned": planned.aligned}
            sources = {"base": "base", "aligned": planned.origin}
            return RecordOperands(reader, {side: record for side in used if (record := records[side])}, sources)
        case PackedTensorDelta() as delta:
            return PackedOperands(delta, reader, used)
        case LowRankTensorDelta() as delta if "delta" in used:
            return LowRankOperands(delta, reader)
        case FullTensorDelta() as delta if "delta" in used:
            stored: dict[Operand, TensorRecord] = {"base": delta.base, "delta": delta.record}
            return RecordOperands(reader, stored, {"base": "base", "delta": "delta"})
        case delta:
            return RecordOperands(reader, {"base": delta.base}, {"base": "base"})


def compile_kernels(delta_format: str | None) -> None:
    """Compile the loops that a load on the CPU uses, so that they are ready when it begins.

    Args:
        delta_format: ``packed``, ``lora`` or ``full``; None for a pair.
    """
    fused()
    if delta_format == "packed":
        extrapolating()
    if delta_format == "lora":
        low_rank()
