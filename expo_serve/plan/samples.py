"""Reads the first values of stored tensors, for what headers cannot tell. A sample can prove a difference only."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from expo_serve.checkpoint.records import TensorRecord
from expo_serve.errors import CheckpointError

_SAMPLED_VALUES = 256
"""Values that are sampled of each tensor."""


def mean_size(record: TensorRecord) -> float:
    """Return the mean absolute value of a floating-point tensor's first values, without importing torch.

    Raises:
        CheckpointError: the file cannot be read.
    """
    raw, width = _first_bytes(record, record.numel), record.itemsize
    raw = raw[: len(raw) // width * width]
    if record.dtype == "BF16":  # the upper half of an fp32
        raw = b"".join(bytes(2) + raw[at : at + 2] for at in range(0, len(raw), 2))
        width = 4
    letter = {2: "e", 4: "f", 8: "d"}[width]
    values = struct.unpack(f"<{len(raw) // width}{letter}", raw)
    return float(sum(abs(value) for value in values)) / max(1, len(values))


def are_zero(records: Iterable[TensorRecord]) -> bool:
    """Return whether the first values of all floating-point tensors are zero; the first other value ends the reading.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return all(mean_size(record) == 0 for record in records)


def differ(one: TensorRecord, other: TensorRecord) -> bool:
    """Return whether two tensors of one dtype begin with other bytes.

    Raises:
        CheckpointError: a file cannot be read.
    """
    count = min(one.numel, other.numel)
    return _first_bytes(one, count) != _first_bytes(other, count)


def _first_bytes(record: TensorRecord, count: int) -> bytes:
    try:
        with record.file.open("rb") as file:
            file.seek(record.offset)
            return file.read(min(count, _SAMPLED_VALUES) * record.itemsize)
    except OSError as error:
        raise CheckpointError(f"{record.file}: cannot be read: {error.strerror}") from None
