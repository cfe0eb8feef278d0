"""Finds the entries of a zip archive as torch.save writes it: stored, in one piece, described alike in both places.

Format: the ZIP specification (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT), of which torch's writer
(caffe2/serialize/inline_container.cc over miniz) uses a small part: entries are never compressed, their sizes stand in
the central directory and behind the data (flag bit 3), a zip64 end record is always there, and padding in the local
headers aligns the data. ``zipfile`` is not used: it searches for an archive where bytes stand before or behind it,
keeps the last of two entries of one name, and does not say where the data begins. Here an archive is the whole file,
and whatever two readers could understand differently is refused.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import NamedTuple

from expo_serve.errors import CheckpointError

MAX_ENTRIES = 200_000
MAX_DIRECTORY_BYTES = 64 * 2**20
MAX_NAME_BYTES = 1024
LOCAL_MAGIC = b"PK\x03\x04"
_AGAIN = "copy or download it again"
_CONVERT = "save it again with torch.save, or convert it to safetensors"

_END = Struct("<4s4H2LH")  # magic, disk, disk of the directory, entries here, entries, bytes, offset, comment
_END64 = Struct("<4sQ2H2L4Q")  # magic, bytes of the rest, versions, two disks, entries here, entries, bytes, offset
_LOCATOR = Struct("<4sLQL")  # magic, disk, offset of the zip64 end record, disks
_CENTRAL = Struct("<4s6H3L5H2L")
_LOCAL = Struct("<4s5H3L2H")
_DESCRIPTORS = (Struct("<4s3L"), Struct("<4sL2Q"))  # magic, CRC, two sizes
_NO_VALUE_16, _NO_VALUE_32 = 0xFFFF, 0xFFFFFFFF  # the value stands in the zip64 record
_ZIP64_EXTRA = 1
_ENCRYPTED = 0x0001 | 0x0040 | 0x2000
_SIZES_BEHIND, _UTF8 = 0x0008, 0x0800
_IS_FOLDER = 0x10  # an attribute of DOS


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: ``header`` to ``end`` are all of its bytes in the file, ``data`` is where its content begins."""

    name: str
    header: int
    data: int
    size: int
    end: int


class _Central(NamedTuple):
    """What the central directory says of one entry."""

    name: bytes
    flags: int
    crc: int
    size: int
    header: int


def read_at(descriptor: int, offset: int, count: int) -> bytes:
    """Return ``count`` bytes at ``offset``, or fewer where the file ends."""
    parts = []
    while count > 0 and (part := os.pread(descriptor, count, offset)):
        parts.append(part)
        offset, count = offset + len(part), count - len(part)
    return b"".join(parts)


def read_entries(path: Path, descriptor: int, size: int) -> dict[str, Entry]:
    """Read and check the directory of an archive and the header of each entry; no content is read.

    Args:
        path: the file, for messages.
        descriptor: of the file, opened for reading.
        size: of the file in bytes.

    Returns:
        The entries by their names, in the order of the directory.

    Raises:
        CheckpointError: the archive is cut, has bytes before or behind it, or an entry is compressed, encrypted,
            stored twice, over another one, or described differently in the directory and before its data.
    """
    count, start, length = _find_directory(path, descriptor, size)
    centrals = _read_directory(path, read_at(descriptor, start, length), count)
    entries: dict[str, Entry] = {}
    seen: set[str] = set()
    for central in centrals:
        entry = _entry(path, descriptor, central, start)
        if entry.name.lower() in seen:  # torch's reader does not tell small letters from capitals
            raise CheckpointError(f"{path}: zip entry {entry.name!r:.200} is there twice; {_CONVERT}")
        seen.add(entry.name.lower())
        entries[entry.name] = entry
    _check_overlaps(path, entries)
    return entries


def _find_directory(path: Path, descriptor: int, size: int) -> tuple[int, int, int]:
    """Return number of entries, offset and length of the central directory, which must end where its end record is."""
    position = size - _END.size
    raw = read_at(descriptor, max(position, 0), _END.size)
    if position < 0 or raw[:4] != b"PK\x05\x06" or raw[-2:] != b"\0\0":
        raise CheckpointError(
            f"{path}: file is truncated, or has bytes behind the zip archive: expected the archive's end record in "
            f"the last {_END.size} bytes, found none; {_AGAIN}"
        )
    _, disk, directory_disk, here, count, length, start, _ = _END.unpack(raw)
    if disk or directory_disk or here != count:
        raise CheckpointError(f"{path}: zip archive is split over several files; {_CONVERT}")
    before = read_at(descriptor, max(position - _LOCATOR.size, 0), _LOCATOR.size)
    if before.startswith(b"PK\x06\x07"):
        position -= _LOCATOR.size + _END64.size
        found = _read_end64(path, before, read_at(descriptor, max(position, 0), _END64.size), position)
        limits = (_NO_VALUE_16, _NO_VALUE_32, _NO_VALUE_32)
        pairs = zip((count, start, length), found, limits, strict=True)
        if any(short not in (long, limit) for short, long, limit in pairs):
            raise CheckpointError(f"{path}: the two end records of the zip archive contradict each other; {_AGAIN}")
        count, start, length = found
    if start + length != position:
        raise CheckpointError(
            f"{path}: zip directory must end at byte {position}, by its end record it ends at {start + length}: bytes "
            f"stand before the archive or are missing; {_AGAIN}"
        )
    if count > MAX_ENTRIES or length > MAX_DIRECTORY_BYTES:
        raise CheckpointError(
            f"{path}: zip directory has {count} entries in {length} bytes, the limits are {MAX_ENTRIES} and "
            f"{MAX_DIRECTORY_BYTES}; convert it to safetensors"
        )
    return count, start, length


def _read_end64(path: Path, locator: bytes, raw: bytes, position: int) -> tuple[int, int, int]:
    _, disk, offset, disks = _LOCATOR.unpack(locator)
    if offset != position or disk or disks > 1 or raw[:4] != b"PK\x06\x06":
        raise CheckpointError(
            f"{path}: expected the zip64 end record at byte {position}, the archive names byte {offset}; {_AGAIN}"
        )
    _, rest, _, _, disk, directory_disk, here, count, length, start = _END64.unpack(raw)
    if rest != _END64.size - 12 or disk or directory_disk or here != count:
        raise CheckpointError(f"{path}: zip64 end record is not one of an archive in one file; {_CONVERT}")
    return count, start, length


def _read_directory(path: Path, raw: bytes, count: int) -> list[_Central]:
    centrals = []
    position = 0
    for number in range(count):
        fixed = raw[position : position + _CENTRAL.size]
        if len(fixed) < _CENTRAL.size or fixed[:4] != b"PK\x01\x02":
            raise CheckpointError(f"{path}: zip directory is damaged at entry {number + 1} of {count}; {_AGAIN}")
        fields = _CENTRAL.unpack(fixed)
        _, _, _, flags, method, _, _, crc, packed, size, names, extras, comments, disk, _, attributes, header = fields
        position += _CENTRAL.size
        name, extra = raw[position : position + names], raw[position + names : position + names + extras]
        position += names + extras + comments
        where = f"{path}: zip entry {name[:200]!r}"
        if disk:
            raise CheckpointError(f"{where} is in another file; {_CONVERT}")
        _check_kind(where, name, flags, method)
        size, packed, header = _from_zip64(where, extra, (size, packed, header))
        if size != packed:
            raise CheckpointError(f"{where}: expected one size, found {size} and {packed} bytes; {_AGAIN}")
        if size and (attributes & _IS_FOLDER or name.endswith(b"/")):  # of which torch would read nothing
            raise CheckpointError(f"{where} is marked as a folder, but has {size} bytes; {_AGAIN}")
        centrals.append(_Central(name, flags, crc, size, header))
    if position != len(raw):
        raise CheckpointError(f"{path}: zip directory has {len(raw)} bytes, its entries {position}; {_AGAIN}")
    return centrals


def _check_kind(where: str, name: bytes, flags: int, method: int) -> None:
    if flags & _ENCRYPTED:
        raise CheckpointError(f"{where} is encrypted; {_CONVERT}")
    if method != 0:
        raise CheckpointError(
            f"{where} is compressed (method {method}), so its values have no place in the file; {_CONVERT}"
        )
    if flags & ~(_SIZES_BEHIND | _UTF8):
        raise CheckpointError(f"{where} has flags {flags:#06x}, which torch.save does not write; {_CONVERT}")
    if len(name) > MAX_NAME_BYTES:
        raise CheckpointError(f"{where}: the name has {len(name)} bytes, the limit is {MAX_NAME_BYTES}; {_CONVERT}")


def _from_zip64(where: str, extra: bytes, values: tuple[int, ...]) -> tuple[int, ...]:
    """Return the values with those that did not fit into 32 bits taken from the extra field."""
    if _NO_VALUE_32 not in values:
        return values
    position = 0
    wide = b""
    while position + 4 <= len(extra):
        kind, length = (int.from_bytes(extra[at : at + 2], "little") for at in (position, position + 2))
        if kind == _ZIP64_EXTRA:
            wide = extra[position + 4 : position + 4 + length]
            break
        position += 4 + length
    result = []
    for value in values:
        if value == _NO_VALUE_32:
            if len(wide) < 8:
                raise CheckpointError(f"{where}: its zip64 field lacks a size or an offset; {_AGAIN}")
            value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        result.append(value)
    return tuple(result)


def _entry(path: Path, descriptor: int, central: _Central, directory: int) -> Entry:
    """Read an entry's local header and what stands behind its data, and compare both with the directory."""
    where = f"{path}: zip entry {central.name[:200]!r}"
    raw = read_at(descriptor, central.header, _LOCAL.size) if central.header < directory else b""
    if len(raw) < _LOCAL.size or raw[:4] != LOCAL_MAGIC:
        raise CheckpointError(f"{where}: expected its header at byte {central.header}, found none; {_AGAIN}")
    _, _, flags, method, _, _, crc, packed, size, names, extras = _LOCAL.unpack(raw)
    rest = read_at(descriptor, central.header + _LOCAL.size, names + extras)
    data = central.header + _LOCAL.size + names + extras
    end = data + central.size
    if end > directory:
        raise CheckpointError(
            f"{where}: expected to end before the directory at byte {directory}, ends at {end}; {_AGAIN}"
        )
    if rest[:names] != central.name or (flags, method) != (central.flags, 0):
        raise CheckpointError(f"{where}: its name or its flags differ between directory and header; {_AGAIN}")
    expected = (central.crc, central.size, central.size)
    found = (crc, *_from_zip64(where, rest[names:], (size, packed)))
    if flags & _SIZES_BEHIND:
        found = expected if found == (0, 0, 0) else found
        end += _descriptor_bytes(where, read_at(descriptor, end, min(_DESCRIPTORS[1].size, directory - end)), expected)
    if found != expected:
        raise CheckpointError(
            f"{where}: its size or checksum differs between directory and header: "
            f"expected {central.size} bytes, found {found[1]}; {_AGAIN}"
        )
    try:
        return Entry(central.name.decode(), central.header, data, central.size, end)
    except UnicodeDecodeError:
        raise CheckpointError(f"{where}: the name is not UTF-8; {_CONVERT}") from None


def _descriptor_bytes(where: str, raw: bytes, expected: tuple[int, int, int]) -> int:
    """Return the length of the record of checksum and sizes that follows the data: 32-bit sizes, or 64."""
    for form in _DESCRIPTORS:
        if len(raw) >= form.size and form.unpack(raw[: form.size]) == (b"PK\x07\x08", *expected):
            return form.size
    raise CheckpointError(f"{where}: its size or checksum differs between directory and the end of its data; {_AGAIN}")


def _check_overlaps(path: Path, entries: dict[str, Entry]) -> None:
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.header):
        if entry.header < end:
            raise CheckpointError(f"{path}: zip entry {entry.name!r:.200} overlaps the previous one; {_AGAIN}")
        end = entry.end
