"""A file of weights in the address space: its bytes are combined where the page cache has them, without a copy.

Loops populate what they need just before they read it, so that an error of the storage is an error of a call, and
whatever is left (a file that is cut between the two) is noticed by :mod:`expo_serve.kernels.guard`.
"""

from __future__ import annotations

import mmap
import weakref
from pathlib import Path

import numpy as np

from expo_serve.checkpoint.source import is_on_network
from expo_serve.load.selection import FileSpan


class MappedFile:
    """A whole file, mapped to be read while this object lives.

    Args:
        descriptor: of the open file.

    Raises:
        Exception: of whatever kind, where it cannot be mapped and watched: an empty file, a file system without
            mappings, a platform without a handler.
    """

    def __init__(self, descriptor: int) -> None:
        from expo_serve.kernels import guard

        if not guard.is_possible():
            raise OSError("mappings cannot be watched on this platform")
        guard.install()
        self._map = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        self._address, self._size = np.frombuffer(self._map, np.uint8).ctypes.data, len(self._map)
        number = guard.watch(self._address, self._size)
        if number is None:
            raise OSError("too many mappings")
        self._number = number
        weakref.finalize(self, guard.unwatch, number)

    def address_of(self, part: FileSpan) -> int | None:
        """Return where the 16-bit values of a span are; None if it is not aligned to them, or not in the mapping."""
        return None if part.offset % 2 or part.end > self._size else self._address + part.offset

    def release(self, part: FileSpan) -> None:
        """Take the pages of a span out of the resident set. They stay in the page cache."""
        first, end = -(-part.offset // mmap.PAGESIZE) * mmap.PAGESIZE, part.end // mmap.PAGESIZE * mmap.PAGESIZE
        if first < end:
            self._map.madvise(mmap.MADV_DONTNEED, first, end - first)

    @property
    def is_intact(self) -> bool:
        """False once a page could not be read: it holds zeros since, and nothing of this mapping may be used."""
        from expo_serve.kernels import guard

        return not guard.has_faulted(self._number)


def map_file(path: Path, descriptor: int) -> MappedFile | None:
    """Map an open file; None where that is impossible, or unwise: a network file system reads it page by page."""
    if is_on_network(path):
        return None
    try:
        return MappedFile(descriptor)
    except Exception:  # noqa: BLE001  # numba and LLVM raise many kinds; reads do the same work
        return None
