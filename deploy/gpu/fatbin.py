"""Cuts the code for other cards out of a CUDA library: it is zeroed in place, so that the library packs small.

A library holds containers ("fat binaries"), each with the same kernels compiled for several architectures: as machine
code (cubin), which runs on cards of the same major version from its minor version on, and as PTX, which the driver
compiles for any later card. In each container what the wanted card would take is kept, and the payload of all else is
zeroed. No offset changes, so the library loads as before.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_MAGIC = b"\x50\xed\x55\xba"
_CONTAINER = struct.Struct("<IHHQ")
"""Magic, version, size of this header, size of what follows it."""
_ENTRY = struct.Struct("<HHIQIIHHI")
"""Kind, attributes, size of this header, size of the payload, packed size, options, minor, major, architecture."""
_PTX, _CUBIN = 1, 2
_LEAST_HEADER = 64


@dataclass(frozen=True)
class Code:
    """One entry of a container."""

    is_cubin: bool
    capability: int
    """Of the card it was compiled for: 90 for 9.0."""
    start: int
    size: int

    def runs_on(self, capability: int) -> bool:
        """Whether a card takes it, as it is or through the driver's compiler."""
        if self.is_cubin and self.capability // 10 != capability // 10:
            return False
        return self.capability <= capability


def cut(library: bytes, capability: int, keeps_ptx: bool = True) -> tuple[bytes, Counter[str]]:
    """Keep what one card needs.

    Args:
        library: the bytes of a shared library.
        capability: of the card, 90 for 9.0.
        keeps_ptx: keep what the driver would have to compile; without it some kernels are missing.

    Returns:
        The library, and the bytes of payload by ``kept`` and ``zeroed``, with the number of ``containers`` and of those
        that have nothing for this card (``other cards``).
    """
    data, counts = bytearray(library), Counter[str]()
    for entries in containers(library):
        kept = [code for code in _needed(entries, capability) if code.is_cubin or keeps_ptx]
        counts["containers"] += 1
        counts["other cards"] += not kept
        for code in entries:
            counts["kept" if code in kept else "zeroed"] += code.size
            if code not in kept:
                data[code.start : code.start + code.size] = bytes(code.size)
    return bytes(data), counts


def _needed(entries: list[Code], capability: int) -> list[Code]:
    """Machine code if there is any for the card, all of the nearest version; else PTX."""
    able = [code for code in entries if code.runs_on(capability)]
    able = [code for code in able if code.is_cubin] or able
    nearest = max((code.capability for code in able), default=0)
    return [code for code in able if code.capability == nearest]


def containers(library: bytes) -> Iterator[list[Code]]:
    """The entries of each container, in their order."""
    place = library.find(_MAGIC)
    while place >= 0:
        entries, end = _container(library, place)
        if entries:
            yield entries
        place = library.find(_MAGIC, end)


def _container(library: bytes, place: int) -> tuple[list[Code], int]:
    """The entries at a place where the magic number stands, and where to look on; none if it stands there by chance."""
    if place + _CONTAINER.size > len(library):
        return [], len(library)
    _, version, header, size = _CONTAINER.unpack_from(library, place)
    if version != 1 or header != _CONTAINER.size or size > len(library) - place - header:
        return [], place + len(_MAGIC)
    entries, at, end = [], place + header, place + header + size
    while at + _LEAST_HEADER <= end:
        kind, _, entry_header, payload, _, _, _, _, capability = _ENTRY.unpack_from(library, at)
        if kind not in (_PTX, _CUBIN) or entry_header < _LEAST_HEADER or at + entry_header + payload > end:
            break
        entries.append(Code(kind == _CUBIN, capability, at + entry_header, payload))
        at += entry_header + payload
    return entries, end
