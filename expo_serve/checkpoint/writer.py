"""Writing safetensors files value by value: no file, and no tensor, has to be in memory whole.

The format's own library writes a file from all of its tensors at once. Format: see :mod:`expo_serve.checkpoint.header`.
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
    """One file. Tensors may be written in any order and in parts; the header comes last, in room kept for it.

    Args:
        file: to be made.
        room: bytes of the header, at least what :func:`header_bytes` gives for the final one.
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
        """Write bytes of the data part.

        Raises:
            OSError: as the system says it: a full disk, most often; it names the file.
        """
        view, place = memoryview(data).cast("B"), self.start + offset
        while view:
            try:
                count = os.pwrite(self._descriptor, view, place)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.file)) from None
            view, place = view[count:], place + count

    def finish(self, header: bytes) -> None:
        """Write the header: all is there.

        Raises:
            OSError: see :meth:`write`.
        """
        assert len(header) <= self._room
        self.write(-self.start, self._room.to_bytes(8, "little") + header.ljust(self._room))


def header_bytes(
    sizes: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str], longest: bool = False
) -> bytes:
    """A header, for tensors that lie one behind the other in this order.

    Args:
        sizes: name to dtype (the format's name), shape and bytes.
        metadata: texts.
        longest: with offsets as long as they can be, to know how much room the final one may need.
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
    """What :func:`header_bytes` wants to know of tensors."""
    return {name: (record.dtype, record.shape, record.nbytes) for name, record in records.items()}
