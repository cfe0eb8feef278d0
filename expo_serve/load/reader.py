"""From a tensor's record to its bytes in memory: positioned reads, and nothing else. No formula here.

Why reads and no mapping. A pair of 1.07 GB a side, two cores of an AMD EPYC, page cache warm, combined by two threads,
in the run in which plain vLLM's way (one thread copies one side out of its mapping) took 0.107 s: reads of 1 MB into a
buffer that stays in the cache 0.113 s, of 2 MB 0.110, of 256 KB 0.15; two mappings 0.097 where the kernel maps
them by huge pages and 0.31 at worst (one thread, operands at one offset of their pages); mappings that are dropped
behind the work 0.105 to 0.23, by the size of a piece. A read costs the same whatever the page cache is made of, leaves
nothing in the resident set, works on network file systems, and answers with an error where a mapping kills the
process: when a file shrinks or its storage fails.

Cold, the same pair took 1.84 times one side with requests of 1 MB by two threads (the disk's own rate), 2.2 with 2 MB
and 2.9 with 8 MB: requests larger than the kernel's window for reading ahead go around it. Asking for more ahead
(POSIX_FADV_WILLNEED, 4 to 64 MB) made it 2.4 and cost 12% of a warm load; direct reads took 3.0.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from expo_serve.checkpoint.records import Operand, TensorRecord
from expo_serve.errors import CheckpointError, LoadError
from expo_serve.kernels.bf16 import Place
from expo_serve.kernels.reading import Offsets, read_runs
from expo_serve.load.activity import ReadActivity
from expo_serve.load.dtypes import TORCH_DTYPES
from expo_serve.load.read_ahead import FileSpan
from expo_serve.load.selection import Selection, span

PIECE_BYTES = 2 << 20
"""Of each side, combined at a time: both and the result stay in the cache, and Python's share stays small."""

_MAX_SPREAD = 3
"""Bytes read for each byte wanted, at most, where single elements lie apart."""


class Buffer:
    """Memory that is read into again and again.

    Args:
        memory: uint8, contiguous, on the CPU.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self.bytes = _bytes(memory)
        self.address = memory.data_ptr()
        self._memory = memory
        self._views: dict[tuple[torch.dtype, tuple[int, ...]], torch.Tensor] = {}

    def values(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The first bytes as a tensor. Most pieces have one shape, and its view is kept."""
        if (view := self._views.get((dtype, shape))) is None:
            size = math.prod(shape) * dtype.itemsize
            view = self._memory[:size].view(dtype).view(shape)
            self._views = {(dtype, shape): view}
        return view


class Reader:
    """Opens each file once, for as long as the reader lives; threads may share it.

    Args:
        activity: where it says what it is doing.
    """

    def __init__(self, activity: ReadActivity | None = None) -> None:
        self.activity = activity or ReadActivity()
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._scratch = threading.local()
        weakref.finalize(self, _close, self._files)

    def check(self, record: TensorRecord) -> None:
        """See that a tensor's file can be read and is as long as its header said.

        Raises:
            CheckpointError: it is gone, or has become shorter.
        """
        try:
            size = os.fstat(self._descriptor(record.file)).st_size
        except OSError as error:
            raise _unreadable(record, error) from None
        if size < record.offset + record.nbytes:
            raise _cut(record)

    def read(self, record: TensorRecord, elements: Selection, slot: str) -> torch.Tensor:
        """Read elements into this thread's buffer of a name; the next read into it by this thread overwrites them.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter.
            LoadError: there is no memory for the buffer.
        """
        size = elements.numel * TORCH_DTYPES[record.dtype].itemsize
        return self.read_into(record, elements, self.buffer(slot, size))

    def buffer(self, slot: str, size: int) -> Buffer:
        """This thread's buffer of a name, of at least so many bytes.

        Raises:
            LoadError: there is no memory for it.
        """
        buffer: Buffer | None = getattr(self._scratch, slot, None)
        if buffer is None or len(buffer.bytes) < size:
            buffer = Buffer(_allocate(max(size, PIECE_BYTES), slot))
            setattr(self._scratch, slot, buffer)
        return buffer

    def read_into(self, record: TensorRecord, elements: Selection, buffer: Buffer) -> torch.Tensor:
        """Read elements into given memory.

        Args:
            record: whose.
            elements: which.
            buffer: at least as many bytes as the elements have.

        Returns:
            A view of the buffer with the elements' shape; its strides are in the order of the file.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter.
        """
        dtype, shape = TORCH_DTYPES[record.dtype], elements.shape
        if elements.is_contiguous:
            self._read_runs(record, np.array([elements.offset]), buffer.bytes[: elements.numel * dtype.itemsize])
            return buffer.values(dtype, shape)
        layout = _Layout.of(elements)
        values = buffer.values(dtype, layout.shape)
        if layout.is_scattered:  # single elements near each other: what lies between them is read too
            around = _allocate((elements.end - elements.offset) * dtype.itemsize, str(record.file))
            self._read_runs(record, np.array([elements.offset]), _bytes(around))
            values.copy_(around.view(dtype).as_strided(layout.shape, layout.stride))
        else:
            self._read_runs(record, layout.run_starts(elements.offset), buffer.bytes[: values.nbytes])
        return values.permute(layout.places).expand(shape)

    def read_onto(self, record: TensorRecord, elements: Selection, dest: torch.Tensor) -> None:
        """Read elements that lie one behind the other straight to where they belong.

        Args:
            record: whose.
            elements: which.
            dest: of the same dtype and size, contiguous, on the CPU.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter.
        """
        self._read_runs(record, np.array([elements.offset]), _bytes(dest.view(torch.uint8)))

    def _read_runs(self, record: TensorRecord, starts: Offsets, memory: memoryview) -> None:
        """Read runs of one length, beginning at these elements of the tensor, one behind the other into memory."""
        file = self._descriptor(record.file)
        try:
            with self.activity.during(record.file):
                read_runs(file, memory, record.offset + starts * record.itemsize)
        except EOFError:
            raise _cut(record) from None
        except OSError as error:
            raise _unreadable(record, error) from None
        self.activity.add_bytes(len(memory))

    def range_of(self, side: str, record: TensorRecord, elements: Selection) -> FileSpan:
        """Where elements that lie one behind the other are in their file."""
        item = record.itemsize
        offset, length = record.offset + elements.offset * item, elements.numel * item
        return FileSpan(side, record.file, self._descriptor(record.file), offset, length)

    @contextmanager
    def placed(
        self, records: Mapping[Operand, TensorRecord], elements: Selection, piece_bytes: int
    ) -> Iterator[dict[Operand, Place]]:
        """Where elements that lie one behind the other can be read from, and memory for a piece of each side; within
        the context somebody else reads them, and counts them."""
        places: dict[Operand, Place] = {}
        for side, record in records.items():
            part = self.range_of(side, record, elements)
            places[side] = Place(part.descriptor, part.offset, self.buffer(side, piece_bytes).address)
        with self.activity.during(*(record.file for record in records.values())):
            yield places

    def _descriptor(self, file: Path) -> int:
        if (descriptor := self._files.get(file)) is None:
            with self._lock:
                if (descriptor := self._files.get(file)) is None:
                    descriptor = self._files[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        return descriptor


@dataclass(frozen=True, slots=True)
class _Layout:
    """How elements lie in the file: their dimensions from the widest stride to the narrowest, repeated ones once."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    places: tuple[int, ...]
    """Where each dimension of the elements has gone."""
    run: int
    """Selection that lie one behind the other."""

    @staticmethod
    def of(elements: Selection) -> _Layout:
        sizes = [1 if stride == 0 else size for size, stride in zip(elements.shape, elements.stride, strict=True)]
        order = sorted(range(len(sizes)), key=lambda dim: elements.stride[dim], reverse=True)
        shape, stride = tuple(sizes[dim] for dim in order), tuple(elements.stride[dim] for dim in order)
        run = 1
        for size, step in zip(reversed(shape), reversed(stride), strict=True):
            if size != 1 and step != run:
                break
            run *= size
        return _Layout(shape, stride, tuple(order.index(dim) for dim in range(len(order))), run)

    @property
    def is_scattered(self) -> bool:
        """Whether single elements lie apart, but not so far that reading all between them would cost more."""
        return self.run == 1 and span(self.shape, self.stride) <= _MAX_SPREAD * math.prod(self.shape)

    def run_starts(self, offset: int) -> Offsets:
        """Where each run begins, the first at ``offset``, in elements."""
        starts, length = np.array([offset]), math.prod(self.shape)
        for size, step in zip(self.shape, self.stride, strict=True):
            if length <= self.run:
                break
            starts = (starts[:, None] + np.arange(size) * step).reshape(-1)
            length //= size
        return starts


def _allocate(size: int, what: str) -> torch.Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    except RuntimeError:
        raise LoadError(f"no memory to read {what}: {size} bytes were refused; give the process more") from None


def _bytes(memory: torch.Tensor) -> memoryview:
    return memoryview(memory.numpy())  # type: ignore[arg-type]  # numpy's stubs know buffers from Python 3.12 on


def _cut(record: TensorRecord) -> CheckpointError:
    return CheckpointError(f"{record.file}: tensor {record.name!r} is cut: the file has become shorter")


def _unreadable(record: TensorRecord, error: OSError) -> CheckpointError:
    return CheckpointError(f"{record.file}: tensor {record.name!r} cannot be read: {error.strerror or error}")


def _close(files: dict[Path, int]) -> None:
    for descriptor in files.values():
        os.close(descriptor)
