"""From a tensor's record to its bytes in memory. No formula here.

For now: safetensors' own memory mapping; nothing is read until a value is looked at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from expo_serve.errors import CheckpointError
from expo_serve.weights.header import TensorRecord


class Reader:
    """Opens each file once, for as long as the reader lives."""

    def __init__(self) -> None:
        self._files: dict[Path, Any] = {}

    def tensor(self, record: TensorRecord) -> torch.Tensor:
        """The tensor as a view of its file: shape and dtype of the record, on the CPU.

        Raises:
            CheckpointError: the file is gone or has changed since its header was checked.
        """
        try:
            if record.file not in self._files:
                self._files[record.file] = safe_open(record.file, framework="pt")
            found = self._files[record.file].get_tensor(record.name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{record.file}: tensor {record.name!r} cannot be read: {error}") from None
        assert isinstance(found, torch.Tensor)
        return found
