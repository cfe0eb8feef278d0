"""Records of tensors on disk, and the one table of the dtypes that a checkpoint may hold."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

Operand = Literal["base", "aligned", "delta"]
"""The inputs from which a tensor of the result is computed."""
JsonObject = dict[str, object]
"""A parsed JSON object, such as a config.json. Its values are foreign, so each is checked where it is used."""


class Dtype(NamedTuple):
    """One dtype of the safetensors format.

    ``itemsize`` is in bytes; ``torch_name`` is torch's attribute of the same dtype; ``kind`` decides whether values are
    extrapolated (float), copied (integer) or refused (quantised).
    """

    itemsize: int
    torch_name: str
    kind: Literal["float", "integer", "quantised"]


DTYPES: dict[str, Dtype] = {
    "BOOL": Dtype(1, "bool", "integer"),
    "U8": Dtype(1, "uint8", "integer"),
    "I8": Dtype(1, "int8", "integer"),
    "U16": Dtype(2, "uint16", "integer"),
    "I16": Dtype(2, "int16", "integer"),
    "U32": Dtype(4, "uint32", "integer"),
    "I32": Dtype(4, "int32", "integer"),
    "U64": Dtype(8, "uint64", "integer"),
    "I64": Dtype(8, "int64", "integer"),
    "F16": Dtype(2, "float16", "float"),
    "BF16": Dtype(2, "bfloat16", "float"),
    "F32": Dtype(4, "float32", "float"),
    "F64": Dtype(8, "float64", "float"),
    "F8_E4M3": Dtype(1, "float8_e4m3fn", "quantised"),
    "F8_E5M2": Dtype(1, "float8_e5m2", "quantised"),
    "F8_E8M0": Dtype(1, "float8_e8m0fnu", "quantised"),
    "F8_E4M3FNUZ": Dtype(1, "float8_e4m3fnuz", "quantised"),
    "F8_E5M2FNUZ": Dtype(1, "float8_e5m2fnuz", "quantised"),
}
"""All dtypes, by the format's own names (https://github.com/huggingface/safetensors#format)."""
FLOAT_DTYPES = frozenset(name for name, dtype in DTYPES.items() if dtype.kind == "float")
DITHERED_DTYPES = frozenset({"BF16", "F16"})
"""Results of these dtypes can be rounded dithered; in wider ones rounding to nearest loses nothing of alpha."""
SUB_BYTE_DTYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2"})
"""Dtypes of the format with less than a byte for a value: only quantised checkpoints have them."""
QUANTISED_DTYPES = frozenset(name for name, dtype in DTYPES.items() if dtype.kind == "quantised")


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Where one tensor is stored: file, absolute offset in bytes, dtype (the format's name) and shape."""

    name: str
    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.itemsize

    @property
    def is_float(self) -> bool:
        """True if the values can be extrapolated."""
        return DTYPES[self.dtype].kind == "float"

    @property
    def dtype_and_shape(self) -> str:
        """Dtype and shape for messages: ``BF16 [16, 8]``."""
        return f"{self.dtype} {list(self.shape)}"

    def grows_into(self, other: TensorRecord) -> bool:
        """True if ``other`` has this shape, or more rows of the same length (a larger vocabulary)."""
        return grows_into(self.shape, other.shape)


def grows_into(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """True if ``other`` equals ``shape``, or has more rows of the same length."""
    has_more_rows = len(shape) == len(other) > 0 and shape[1:] == other[1:] and shape[0] <= other[0]
    return shape == other or has_more_rows


def total_bytes(records: Iterable[TensorRecord]) -> int:
    """Size of all records in bytes."""
    return sum(record.nbytes for record in records)
