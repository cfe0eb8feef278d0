"""A look at a few values of a file without loading what loads tensors."""

from __future__ import annotations

import struct

from expo_serve.checkpoint.records import TensorRecord
from expo_serve.errors import CheckpointError

_VALUES = 256


def mean_size(record: TensorRecord) -> float:
    """The mean absolute value of a floating tensor's first values.

    Raises:
        CheckpointError: the file cannot be read.
    """
    count, width = min(record.numel, _VALUES), record.itemsize
    try:
        with record.file.open("rb") as file:
            file.seek(record.offset)
            raw = file.read(count * width)
    except OSError as error:
        raise CheckpointError(f"{record.file}: cannot be read: {error.strerror}") from None
    if record.dtype == "BF16":  # the upper half of an fp32
        raw = b"".join(bytes(2) + raw[at : at + 2] for at in range(0, len(raw), 2))
        width = 4
    letter = {2: "e", 4: "f", 8: "d"}[width]
    values = struct.unpack(f"<{len(raw) // width}{letter}", raw)
    return float(sum(abs(value) for value in values)) / max(1, len(values))
