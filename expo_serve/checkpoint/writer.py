"""Writes safetensors files piece by piece, so that neither a file nor a tensor has to be in memory as a whole.

The format's own library needs all tensors of a file at once. :mod:`expo_serve.checkpoint.header` describes the format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from expo_serve.checkpoint.records import TensorRecord

_ALIGNMENT = 8


class SafetensorsWriter:
    """Writes one file. Tensors may be written in any order and in parts; the header is written last.

    Args:
        file: the file to create; it must not exist.
        room: bytes to reserve for the header: at least the length of what :func:`header_bytes` returns.

    Raises:
        OSError: the file cannot be created.
    """

    def __init__(self, file: Path, room: int) -> None:
        self.file = file
        self.start = 8 + room
        self._room = room
        self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes of the data, at ``offset`` bytes from the end of the header.

        Raises:
            OSError: the system refused the write, most often because the disk is full; names the file.
        """
        view, position = memoryview(data).cast("B"), self.start + offset
        while view:
            try:
                count = os.pwrite(self._descriptor, view, position)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.file)) from None
            view, position = view[count:], position + count

    def finish(self, header: bytes) -> None:
        """Write the header, once all data is written.

        Raises:
            OSError: the system refused the write; names the file.
        """
        assert len(header) <= self._room
        self.write(-self.start, self._room.to_bytes(8, "little") + header.ljust(self._room))


def header_bytes(
    sizes: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str], longest: bool = False
) -> bytes:
    """Return the header of a file whose tensors are stored contiguously in this order.

    Args:
        sizes: name to dtype (the format's name), shape and size in bytes.
        metadata: the content of ``__metadata__``.
        longest: use the longest possible shapes and offsets, to find out how much room the final header may need.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape, size) in sizes.items():
        offsets = [10**18, 10**18] if longest else [end, end + size]
        entries[name] = {"dtype": dtype, "shape": [10**18] if longest else list(shape), "data_offsets": offsets}
        end += size
    raw = json.dumps(entries, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % _ALIGNMENT)


def sizes_of(records: Mapping[str, TensorRecord]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Return name to dtype, shape and size in bytes, as :func:`header_bytes` takes them."""
    return {name: (record.dtype, record.shape, record.nbytes) for name, record in records.items()}
