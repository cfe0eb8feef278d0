"""The packed delta: a lossless difference between two checkpoints, format version 1.

A folder with config.json, tokenizer and the other companion files of the aligned checkpoint, and
``delta.safetensors`` or ``delta-00001-of-00003.safetensors`` and so on. In each of these files, ``__metadata__`` maps
strings to strings:

=============== ==================================================================================================
``expo_delta``  the format's version, ``1``
``files``       the number of files of the delta
``block``       the number of values in a block: a power of two
``base``        JSON, ``{"name", "revision", "made_from"}``: the base that the delta was made against, for messages;
                ``made_from``, which older files lack: expo-serve's version, and name, revision and fingerprint of
                both sides
``tensors``     JSON, an object from the name of each tensor in this file to an object with its ``dtype`` and ``shape``
                in the aligned checkpoint (dtypes by the names of safetensors); ``base``: ``[name, dtype, shape]`` of
                the base tensor from which its values are predicted, or null; ``extrapolated``: false if the tensor is
                copied at every alpha; ``table``: the checksum of its table
``checksum``    of the UTF-8 bytes of the five strings above, in this order, each followed by a zero byte
=============== ==================================================================================================

Each tensor is stored under its own name as ``U8`` of one dimension: its table, then its blocks, contiguous.

*Blocks.* Values count in row-major order. The first ones, as many as the base tensor has, are cut into blocks from 0
on; the values that the aligned tensor has beyond them (new rows of a vocabulary) are cut into further blocks, which
have no base. A tensor without a base has blocks of the second kind only.

*Table.* 32 bytes for each block, little-endian: the checksum of the block's bytes in the base tensor (u64, 0 without
base), the checksum of its packed bytes (u64, 0 if there are none), and four u32: the coding, and the sizes in bytes of
the three parts of the packed bytes.

*Codings.*

====== ===========================================================================================================
0      Same: the values are base's. No bytes.
1      Sparse. Part one, bytes: the number of values between a changed value and the previous one (or the beginning of
       the block), up to 254; the escape code 255 skips 255 values and continues with the next byte. Part two, one byte
       for each changed value: its step minus one; the escape code 255 means that the step does not fit and is stored
       in part three. Part three: those steps, in the width of the dtype, shuffled.
2      Shuffled. Part one: all bytes of the values, shuffled.
3      Raw. Part one: all bytes of the values.
====== ===========================================================================================================

A *step* is the difference ``rank(aligned) - rank(base)`` modulo 2 to the number of bits, zigzag-coded (0, -1, 1, -2
become 0, 1, 2, 3), with ``rank(x) = x ^ ((x >> bits - 1) & 2^(bits - 1) - 1)`` of the values' bits as a signed
integer (>> keeps the sign). Neighbouring floating-point numbers have neighbouring ranks, and 0.0 follows -0.0. If
base's dtype differs, its values are first cast to the aligned tensor's dtype, to the nearest with ties to even.
*Shuffled* bytes are sorted by significance: all lowest bytes first, then all second ones, and so on. All parts but that
of coding 3 are Zstandard frames (RFC 8878) that contain their content size; an empty part has no bytes. A *checksum* is
XXH3 with 64 bits and no seed (https://github.com/Cyan4973/xxHash), as an integer in the table and as 16 hexadecimal
digits in the metadata.

Gaps and steps are stored instead of whole differences because a fine-tuned model shares 80 to 95% of its bf16 values
with its base, and decoding costs only what is decoded. Measurements: docs/performance.md#packed.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import xxhash

from expo_serve.checkpoint.header import MAX_DIMENSIONS, MAX_NAME
from expo_serve.checkpoint.records import DTYPES, FLOAT_DTYPES, QUANTISED_DTYPES, JsonObject, TensorRecord, grows_into
from expo_serve.errors import CheckpointError
from expo_serve.shown import plain, shown

VERSION_KEY = "expo_delta"
VERSION = "1"
BLOCK = 1 << 20
"""Number of values in a block that we write: few enough for the cache, and enough that Python's share stays small."""
MAX_BLOCK = 1 << 24
_KEYS = (VERSION_KEY, "files", "block", "base", "tensors")

SAME, SPARSE, SHUFFLED, RAW = range(4)
TABLE_ENTRY = struct.Struct("<QQ4I")
"""One block's entry in a tensor's table: two checksums, the coding, and the sizes of three parts."""


def checksum(data: bytes | memoryview) -> int:
    """Return the XXH3 checksum, 64 bits, of a contiguous buffer."""
    return xxhash.xxh3_64_intdigest(data)


@dataclass(frozen=True)
class PackedTensor:
    """The metadata of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    base: tuple[str, str, tuple[int, ...]] | None
    """Name, dtype and shape of the base tensor from which the values are predicted."""
    extrapolated: bool
    table: str
    """The checksum of the table, 16 hexadecimal digits."""

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def values_in_base(self) -> int:
        """Number of values that have a partner in base."""
        return math.prod(self.base[2]) if self.base else 0

    def spans(self, block: int) -> list[tuple[int, int]]:
        """Return the first value of each block and the one after its last.

        Args:
            block: number of values in a block.
        """
        ends = [(0, self.values_in_base), (self.values_in_base, self.numel)]
        return [(at, min(at + block, end)) for start, end in ends for at in range(start, end, block)]

    def count(self, block: int) -> int:
        """Return the number of blocks of ``block`` values each."""
        return -(-self.values_in_base // block) + -(-(self.numel - self.values_in_base) // block)

    def to_json(self) -> JsonObject:
        """Return the tensor's entry in the metadata."""
        base = [self.base[0], self.base[1], list(self.base[2])] if self.base else None
        return {
            "dtype": self.dtype, "shape": list(self.shape), "base": base, "extrapolated": self.extrapolated,
            "table": self.table,
        }  # fmt: skip


@dataclass(frozen=True)
class FileInfo:
    """The metadata of one file."""

    files: int
    block: int
    base_name: str
    tensors: dict[str, PackedTensor]


def write_info(files: int, base: Mapping[str, object], tensors: Mapping[str, PackedTensor]) -> dict[str, str]:
    """Return the metadata of one file.

    Args:
        files: number of files of the delta.
        base: ``name`` and ``revision`` of the base, and ``made_from``.
        tensors: the tensors in this file.
    """
    entries = {name: tensor.to_json() for name, tensor in tensors.items()}
    values = (VERSION, str(files), str(BLOCK), json.dumps(base), json.dumps(entries))
    return {**dict(zip(_KEYS, values, strict=True)), "checksum": _digest(values)}


def read_info(metadata: Mapping[str, str], records: Mapping[str, TensorRecord], where: str) -> FileInfo:
    """Check and read one file's metadata.

    Args:
        metadata: the ``__metadata__`` of the file's header.
        records: the tensors of the file.
        where: the path of the file, for messages.

    Raises:
        CheckpointError: the metadata is of another version, is damaged, or does not fit the tensors.
    """
    version = metadata.get(VERSION_KEY)
    if version != VERSION:
        raise CheckpointError(
            f"{where}: packed delta of format version {shown(version, 40)}, this expo-serve reads version {VERSION}; "
            "use the version that wrote it, or create the delta again"
        )
    values = tuple(metadata.get(key, "") for key in _KEYS)
    if _digest(values) != metadata.get("checksum", ""):
        raise CheckpointError(f"{where}: the packed delta's header is damaged (wrong checksum); copy it again")
    try:
        info = _parse(values)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: the packed delta's header does not follow its format: {plain(str(error), 300)}"
        ) from None
    _check_records(info, records, where)
    return info


def _digest(values: tuple[str, ...]) -> str:
    return f"{checksum(b''.join(value.encode(errors='surrogatepass') + bytes(1) for value in values)):016x}"


def _parse(values: tuple[str, ...]) -> FileInfo:
    block = int(values[2])
    if not 0 < block <= MAX_BLOCK or block & (block - 1):
        raise ValueError(f"blocks of {block} values")
    tensors = {name: _tensor(name, entry) for name, entry in json.loads(values[4]).items()}
    return FileInfo(int(values[1]), block, plain(json.loads(values[3])["name"], 200), tensors)


# Foreign JSON of any type: whatever an entry lacks raises here, and read_info turns that into a CheckpointError.
def _tensor(name: str, entry: Any) -> PackedTensor:
    base = (entry["base"][0], entry["base"][1], _shape(entry["base"][2])) if entry["base"] is not None else None
    tensor = PackedTensor(
        name, entry["dtype"], _shape(entry["shape"]), base, entry["extrapolated"] is True, entry["table"]
    )
    if not _is_sound(tensor):
        raise ValueError(f"tensor {shown(name, 200)}: {shown(entry, 200)}")
    return tensor


def _is_sound(tensor: PackedTensor) -> bool:
    """Return whether such a tensor can exist: metadata with a valid checksum may still be nonsense."""
    base = tensor.base
    strings = (tensor.dtype, tensor.table, *(base[:2] if base else ()))
    if not all(isinstance(string, str) and string.isprintable() and len(string) <= MAX_NAME for string in strings):
        return False
    dtypes = {tensor.dtype, *((base[1],) if base else ())}
    allowed = FLOAT_DTYPES if tensor.extrapolated else DTYPES.keys() - QUANTISED_DTYPES
    return dtypes <= allowed and (base is None or grows_into(base[2], tensor.shape))


def _shape(sizes: Any) -> tuple[int, ...]:
    if len(sizes) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**62 for size in sizes):
        raise ValueError(f"shape {shown(sizes)}")
    if math.prod(max(size, 1) for size in sizes) >= 2**63:  # some readers overflow before they reach a zero
        raise ValueError(f"shape {shown(sizes)}")
    return tuple(sizes)


def _check_records(info: FileInfo, records: Mapping[str, TensorRecord], where: str) -> None:
    if set(records) != set(info.tensors):
        differing = sorted(set(records) ^ set(info.tensors))
        raise CheckpointError(f"{where}: the packed delta's header does not fit its tensors: {differing[0]!r:.200}")
    for name, record in records.items():
        least = info.tensors[name].count(info.block) * TABLE_ENTRY.size
        if record.dtype != "U8" or len(record.shape) != 1 or record.nbytes < least:
            raise CheckpointError(
                f"{where}: tensor {name!r:.200}: expected U8 of one dimension and at least {least} bytes, found "
                f"{record.dtype} {list(record.shape)}"
            )


@dataclass(frozen=True)
class Table:
    """The table of one tensor; each list has one item for each block."""

    base: list[int]
    """Checksums of base's bytes."""
    packed: list[int]
    """Checksums of the packed bytes."""
    codings: list[int]
    parts: list[tuple[int, ...]]
    """Sizes of the three parts in bytes."""
    offsets: list[int]
    """Offsets of the blocks in bytes from the start of the tensor's packed bytes; one more for the end."""


def read_table(raw: bytes, tensor: PackedTensor, block: int, record: TensorRecord) -> Table:
    """Check and read the table of one tensor.

    Args:
        raw: the bytes of the table.
        tensor: the tensor's metadata.
        block: number of values in a block.
        record: the tensor's packed bytes.

    Raises:
        CheckpointError: the table is damaged.
    """
    if f"{checksum(raw):016x}" != tensor.table:
        raise CheckpointError(
            f"{record.file}: tensor {tensor.name!r}: its table is damaged (wrong checksum); copy it again"
        )
    entries = list(TABLE_ENTRY.iter_unpack(raw))
    offsets = [len(raw) + end for end in accumulate((sum(entry[3:]) for entry in entries), initial=0)]
    if len(entries) != tensor.count(block) or offsets[-1] != record.nbytes:
        raise CheckpointError(f"{record.file}: tensor {tensor.name!r}: its table does not fit its bytes; copy it again")
    return Table(
        base=[entry[0] for entry in entries],
        packed=[entry[1] for entry in entries],
        codings=[entry[2] for entry in entries],
        parts=[entry[3:] for entry in entries],
        offsets=offsets,
    )
