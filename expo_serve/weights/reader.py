"""From a tensor's record to its bytes in memory. No formula here.

Files are mapped, and nothing is read until a value is looked at. Pages are asked for in one call before they
are looked at: touching a mapping page by page costs about twice as much (4.9 against 10.6 GB/s a thread from a
warm page cache).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from expo_serve.errors import CheckpointError
from expo_serve.weights.header import TensorRecord

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_MADV_POPULATE_READ = 22  # Linux 5.14
_POPULATE_FROM_BYTES = 1 << 16


class Reader:
    """Maps each file once, for as long as the reader or a tensor of it lives."""

    def __init__(self) -> None:
        self._files: dict[Path, Any] = {}  # torch's stubs do not know that a slice is a storage again

    def tensor(self, record: TensorRecord) -> torch.Tensor:
        """The tensor as a view of its file: shape and dtype of the record, on the CPU. Not to be written to.

        Raises:
            CheckpointError: the file is gone or has become shorter since its header was checked.
        """
        storage = self._mapped(record.file)
        if storage.nbytes() < record.offset + record.nbytes:
            raise CheckpointError(f"{record.file}: tensor {record.name!r} is cut: the file has become shorter")
        dtype = _DTYPES[record.dtype]
        empty: Any = torch.empty(0, dtype=dtype)
        if record.offset % dtype.itemsize:
            part = storage[record.offset : record.offset + record.nbytes]
            empty.set_(part, 0, record.shape)
        else:
            empty.set_(storage, record.offset // dtype.itemsize, record.shape)
        tensor: torch.Tensor = empty
        return tensor

    def _mapped(self, file: Path) -> Any:
        if file not in self._files:
            try:
                size = file.stat().st_size
                self._files[file] = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=size)
            except (OSError, RuntimeError) as error:
                raise CheckpointError(f"{file}: cannot be mapped: {error}") from None
        return self._files[file]


def populate(view: torch.Tensor) -> None:
    """Bring the pages of a mapped tensor into this process at once, where that is possible and worth it."""
    if sys.platform != "linux" or view.nbytes < _POPULATE_FROM_BYTES or not _is_dense(view):
        return
    start = view.data_ptr() & -mmap.PAGESIZE
    length = view.data_ptr() + view.nbytes - start
    # An older kernel answers EINVAL: the pages then come one by one.
    _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_POPULATE_READ)


def _is_dense(view: torch.Tensor) -> bool:
    """Whether a tensor's elements lie side by side, in whatever order."""
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    return bool(last + 1 == view.numel())


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
