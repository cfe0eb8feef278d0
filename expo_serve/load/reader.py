"""From a tensor's record to its bytes in memory: positioned reads, or a mapping. The formula is in :mod:`.formula`.

pread into reused buffers is what always works: on network file systems, and with a truncated file as an OSError rather
than SIGBUS. Compiled loops may take operands from a mapping instead, where that is faster: :mod:`.ways` decides.
Measurements: docs/performance.md#reading.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from expo_serve import kernels
from expo_serve.checkpoint.records import TensorRecord
from expo_serve.errors import CheckpointError, LoadError
from expo_serve.load import sizes
from expo_serve.load.counts import ReadActivity
from expo_serve.load.dtypes import TORCH_DTYPES
from expo_serve.load.mapping import MappedFile, map_file
from expo_serve.load.selection import FileSpan, Offsets, Selection
from expo_serve.load.ways import Ways


class Buffer:
    """Memory that is read into again and again.

    Args:
        memory: uint8, contiguous, on the CPU.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self.bytes = _bytes(memory)
        self.array: npt.NDArray[np.uint8] = memory.numpy()
        self._memory = memory
        self._views: dict[tuple[torch.dtype, tuple[int, ...]], torch.Tensor] = {}

    def values(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the first bytes as a tensor. Most pieces have one shape, and its view is kept."""
        if (view := self._views.get((dtype, shape))) is None:
            size = math.prod(shape) * dtype.itemsize
            view = self._memory[:size].view(dtype).view(shape)
            self._views = {(dtype, shape): view}
        return view


class Reader:
    """Opens each file once, for as long as the reader lives; threads may share it.

    Args:
        activity: records what is being read.
    """

    def __init__(self, activity: ReadActivity | None = None) -> None:
        self.activity = activity or ReadActivity()
        self._files: dict[Path, int] = {}
        self._sizes: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._scratch = threading.local()
        self._mapped: dict[Path, MappedFile | None] = {}
        self.ways = Ways()
        weakref.finalize(self, _close, self._files)

    def check(self, record: TensorRecord) -> None:
        """Check that a tensor's file can be opened, and was as long as its header said when it was.

        Raises:
            CheckpointError: the file is gone, or has become shorter.
        """
        try:
            self._descriptor(record.file)
        except OSError as error:
            raise _unreadable(record, error) from None
        if self._sizes[record.file] < record.offset + record.nbytes:
            raise _cut(record)

    def read(self, record: TensorRecord, selection: Selection, slot: str) -> torch.Tensor:
        """Read elements into this thread's buffer ``slot``; the next read into it by this thread overwrites them.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter.
            LoadError: there is no memory for the buffer.
        """
        size = selection.numel * TORCH_DTYPES[record.dtype].itemsize
        return self.read_into(record, selection, self.buffer(slot, size))

    def buffer(self, slot: str, size: int) -> Buffer:
        """Return this thread's buffer ``slot``, of at least ``size`` bytes.

        Raises:
            LoadError: there is no memory for it.
        """
        buffer: Buffer | None = getattr(self._scratch, slot, None)
        if buffer is None or len(buffer.bytes) < size:
            buffer = Buffer(_allocate(max(size, sizes.PIECE_BYTES), slot))
            setattr(self._scratch, slot, buffer)
        return buffer

    def read_into(self, record: TensorRecord, selection: Selection, buffer: Buffer) -> torch.Tensor:
        """Read elements into the memory given.

        Args:
            record: the tensor's record.
            selection: which elements.
            buffer: of at least as many bytes as the elements have.

        Returns:
            A view of the buffer with the elements' shape; its strides follow the order of the file.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter.
        """
        dtype, shape = TORCH_DTYPES[record.dtype], selection.shape
        if selection.is_contiguous:
            self._read_extents(record, np.array([selection.offset]), buffer.bytes[: selection.numel * dtype.itemsize])
            return buffer.values(dtype, shape)
        ordered, positions = selection.in_file_order()
        values = buffer.values(dtype, ordered.shape)
        if _is_scattered(ordered):  # what is between the elements is read too
            around = _allocate((selection.end - selection.offset) * dtype.itemsize, str(record.file))
            self._read_extents(record, np.array([selection.offset]), _bytes(around))
            values.copy_(around.view(dtype).as_strided(ordered.shape, ordered.stride))
        else:
            self._read_extents(record, ordered.extent_starts(), buffer.bytes[: values.nbytes])
        return values.permute(positions).expand(shape)

    def read_onto(self, record: TensorRecord, selection: Selection, dest: torch.Tensor) -> None:
        """Read contiguous elements straight to where they belong.

        Args:
            record: the tensor's record.
            selection: which elements.
            dest: of the same dtype and number of elements, contiguous, on the CPU.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter.
        """
        self._read_extents(record, np.array([selection.offset]), _bytes(dest.view(torch.uint8)))

    def _read_extents(self, record: TensorRecord, starts: Offsets, memory: memoryview) -> None:
        """Read extents of one length, which begin at these elements of the tensor, into memory one after another."""
        file = self._descriptor(record.file)
        try:
            with self.activity.during(record.file):
                read_runs(file, memory, record.offset + starts * record.itemsize)
        except EOFError:
            raise _cut(record) from None
        except OSError as error:
            raise _unreadable(record, error) from None
        self.activity.add_bytes(len(memory))

    def span_of(self, operand: str, record: TensorRecord, selection: Selection) -> FileSpan:
        """Return where contiguous elements are in their file."""
        item = record.itemsize
        offset, length = record.offset + selection.offset * item, selection.numel * item
        return FileSpan(operand, record.file, self._descriptor(record.file), offset, length)

    def address_of(self, part: FileSpan) -> int | None:
        """Return where 16-bit values are mapped; None where they cannot be."""
        file = self._mapping(part)
        return file.address_of(part) if file else None

    def release(self, parts: Sequence[FileSpan]) -> bool:
        """Take spans that were used out of the resident set; return False if not all of them could be read."""
        files = [self._mapped[part.path] for part in parts]
        for file, part in zip(files, parts, strict=True):
            if file:
                file.release(part)
        return all(file is not None and file.is_intact for file in files)

    def _mapping(self, part: FileSpan) -> MappedFile | None:
        """Return the file of a span, mapped; None where it cannot be, or where a page of it could not be read."""
        if part.path not in self._mapped:
            with self._lock:
                if part.path not in self._mapped:
                    self._mapped[part.path] = map_file(part.path, part.descriptor)
        file = self._mapped[part.path]
        return file if file and file.is_intact else None

    def _descriptor(self, file: Path) -> int:
        if (descriptor := self._files.get(file)) is None:
            with self._lock:
                if (descriptor := self._files.get(file)) is None:
                    opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                    self._sizes[file] = os.fstat(opened).st_size
                    descriptor = self._files[file] = opened
        return descriptor


def read_runs(file: int, memory: memoryview, offsets: Offsets) -> None:
    """Read extents of one length into memory, one after another.

    Args:
        file: descriptor.
        memory: as many bytes as the extents have together; at least one extent, none of them empty.
        offsets: where in the file each begins.

    Raises:
        EOFError: the file ends too early.
        OSError: from the system call.
    """
    size, done = len(memory) // len(offsets), 0
    if len(offsets) > 1 and kernels.available("reading.gather"):
        from expo_serve.kernels.reading import gather

        done = gather(file, np.frombuffer(memory, np.uint8), np.ascontiguousarray(offsets))
    for index in range(done, len(offsets)):
        _read_exactly(file, memory[index * size : (index + 1) * size], int(offsets[index]))


def _read_exactly(file: int, memory: memoryview, offset: int) -> None:
    """Fill ``memory``; one read may return less than was asked for."""
    while memory:
        if not (count := os.preadv(file, [memory[: sizes.REQUEST_BYTES]], offset)):
            raise EOFError
        memory, offset = memory[count:], offset + count


def _is_scattered(ordered: Selection) -> bool:
    """True for single elements that are apart, but so near that reading all between them costs less."""
    return ordered.extent == 1 and ordered.end - ordered.offset <= sizes.MAX_SPREAD * ordered.numel


def _allocate(size: int, what: str) -> torch.Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    except RuntimeError:
        raise LoadError(
            f"out of memory: cannot allocate a {size / 2**20:.0f} MiB read buffer for {what}; give the process more"
        ) from None


def _bytes(memory: torch.Tensor) -> memoryview:
    return memory.numpy().data


def _cut(record: TensorRecord) -> CheckpointError:
    return CheckpointError(f"{record.file}: tensor {record.name!r} is cut: the file has become shorter")


def _unreadable(record: TensorRecord, error: OSError) -> CheckpointError:
    return CheckpointError(f"{record.file}: tensor {record.name!r} cannot be read: {error.strerror or error}")


def _close(files: dict[Path, int]) -> None:
    for descriptor in files.values():
        os.close(descriptor)
