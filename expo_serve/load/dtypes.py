"""Torch's view of the dtype table, and tensors as NumPy arrays of their bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from expo_serve.checkpoint.records import DTYPES, TensorRecord

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, dtype.torch_name) for name, dtype in DTYPES.items() if dtype.kind != "quantised"
}
"""By the format's own names; quantised tensors are refused before anything is read."""
Bits = npt.NDArray[Any]
"""Values as signed integers of their own width, which is 8, 16, 32 or 64 bits (Any: NumPy has no name for that)."""
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def meta_tensor(record: TensorRecord) -> torch.Tensor:
    """Make a tensor of a record's shape and dtype on the meta device, from which views can be taken."""
    return torch.empty(record.shape, dtype=TORCH_DTYPES[record.dtype], device="meta")


def signed_bits(values: torch.Tensor) -> Bits:
    """View a CPU tensor's values as signed integers of the same width; the memory is shared."""
    bits: Bits = values.view(_SIGNED[values.element_size()]).numpy()
    return bits


def uint16_bits(values: torch.Tensor) -> npt.NDArray[np.uint16]:
    """View a contiguous CPU tensor of 16-bit values as unsigned integers, flat; the memory is shared."""
    bits: npt.NDArray[np.uint16] = values.detach().view(-1).view(torch.uint16).numpy()
    return bits


def uint32_bits(values: torch.Tensor) -> npt.NDArray[np.uint32]:
    """View a contiguous CPU tensor of 32-bit values as unsigned integers, flat; the memory is shared."""
    bits: npt.NDArray[np.uint32] = values.detach().view(-1).view(torch.uint32).numpy()
    return bits
