"""The packed delta: a lossless difference between two checkpoints, format version 1.

A folder: config.json, tokenizer and the other small files of the aligned checkpoint, and ``delta.safetensors`` or
``delta-00001-of-00003.safetensors`` and so on. In each file

``__metadata__`` maps texts to texts:

=============== ==================================================================================================
``expo_delta``  the format's version, ``1``
``files``       how many files there are in all
``block``       values in a block: a power of two
``base``        JSON, ``{"name", "revision"}``: what it was made against, for messages
``tensors``     JSON, an object from the name of each tensor in this file to an object with its ``dtype`` and ``shape``
                in the aligned checkpoint (dtypes by the names of safetensors); ``base``: ``[name, dtype, shape]`` of
                the base tensor that its values are predicted from, or null; ``extrapolated``: false where the tensor
                is taken over at every alpha; ``table``: the checksum of its table
``checksum``    of the UTF-8 bytes of the five texts above, in this order, each followed by a zero byte
=============== ==================================================================================================

Each tensor stands under its own name as ``U8`` of one dimension: its table, then its blocks one behind the other.

*Blocks.* Values count in row-major order. The first ones, as many as the base tensor has, are cut into blocks from 0
on; what the aligned tensor has beyond them (new rows of a vocabulary) is cut into further blocks from there on, which
have no base. A tensor without a base has blocks of the second kind only.

*Table.* For each block 32 bytes, little-endian: the checksum of the block's bytes in the base tensor (u64, 0 without
base), the checksum of its bytes here (u64, 0 if there are none), and four u32: the coding, and the sizes in bytes of
the three parts of which the block consists here.

*Codings.*

====== ===========================================================================================================
0      the same values as base's. No bytes.
1      changes. Part one, bytes: how many values lie between a change and the one before it (or the block's
       beginning), up to 254; 255 means as many, and no change behind them: the next byte goes on. Part two, a byte for
       each change: the step less one, or 255 for one that does not fit. Part three, the steps that did not fit, in the
       width of the dtype, shuffled.
2      whole: part one, the values' bytes, shuffled.
3      whole: part one, the values' bytes as they are.
====== ===========================================================================================================

A *step* is the difference ``rank(aligned) - rank(base)`` modulo 2 to the number of bits, zigzag-coded (0, -1, 1, -2
become 0, 1, 2, 3), with ``rank(x) = x ^ ((x >> bits - 1) & 2^(bits - 1) - 1)`` of the values' bits as a signed
integer (>> keeps the sign): neighbours among the floating-point numbers have neighbouring ranks, and 0.0 comes right
after -0.0. Where base's dtype is another one, its values are first cast to the aligned tensor's, to the nearest with
ties to even. *Shuffled*: all lowest bytes first, then all second ones, and so on. All parts but that of coding 3 are
Zstandard frames (RFC 8878) that give their content size; an empty part has no bytes. A *checksum* is XXH3 with 64
bits and no seed (https://github.com/Cyan4973/xxHash), as a number in the table and as 16 hexadecimal digits in the
metadata.

Why gaps and steps and not whole differences: between a model and its fine-tuned self 80 to 95% of bf16 values are the
same, and decoding costs what is decoded. On the demo's pair (95% the same) this takes 3.0% of the checkpoint's bytes
and one thread decodes 11.6 GB/s of model; whole differences by blosc2 (Zstandard, level 1) took 5.1% at 1.0 GB/s with
its bitshuffle, 5.0% at 1.1 with its shuffle, with LZ4 9.8% at 1.3; a bitmap of what changed in place of the gaps took
3.3% at 6.8 GB/s.
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

from expo_serve.checkpoint.header import MAX_DIMENSIONS
from expo_serve.checkpoint.records import DTYPES, FLOAT_DTYPES, QUANTISED_DTYPES, TensorRecord, grows_into
from expo_serve.errors import CheckpointError

VERSION_KEY = "expo_delta"
VERSION = "1"
BLOCK = 1 << 20
"""Values. What is decoded stays in the cache, and Python's share stays small: with half as many two threads lose a
tenth."""
MAX_BLOCK = 1 << 24
_KEYS = (VERSION_KEY, "files", "block", "base", "tensors")

SAME, SPARSE, SHUFFLED, RAW = range(4)
TABLE_ENTRY = struct.Struct("<QQ4I")
"""A block's entry in a tensor's table: two checksums, the coding, and the sizes of three parts."""


def checksum(data: Any) -> int:
    """XXH3, 64 bits, of anything with bytes in a row."""
    return xxhash.xxh3_64_intdigest(data)


@dataclass(frozen=True)
class PackedTensor:
    """What the metadata says of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    base: tuple[str, str, tuple[int, ...]] | None
    """Name, dtype and shape of the base tensor."""
    extrapolated: bool
    table: str
    """The table's checksum."""

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def values_in_base(self) -> int:
        """How many of them have a partner in base."""
        return math.prod(self.base[2]) if self.base else 0

    def spans(self, block: int) -> list[tuple[int, int]]:
        """From which value to which each block goes."""
        ends = [(0, self.values_in_base), (self.values_in_base, self.numel)]
        return [(at, min(at + block, end)) for start, end in ends for at in range(start, end, block)]

    def count(self, block: int) -> int:
        """Number of blocks."""
        return -(-self.values_in_base // block) + -(-(self.numel - self.values_in_base) // block)

    def to_json(self) -> dict[str, Any]:
        """As it stands in the metadata."""
        base = [self.base[0], self.base[1], list(self.base[2])] if self.base else None
        return {
            "dtype": self.dtype, "shape": list(self.shape), "base": base, "extrapolated": self.extrapolated,
            "table": self.table,
        }  # fmt: skip


@dataclass(frozen=True)
class FileInfo:
    """What one file's metadata says."""

    files: int
    block: int
    base_name: str
    tensors: dict[str, PackedTensor]


def write_info(files: int, base: Mapping[str, Any], tensors: Mapping[str, PackedTensor]) -> dict[str, str]:
    """The metadata of one file."""
    described = {name: tensor.to_json() for name, tensor in tensors.items()}
    texts = (VERSION, str(files), str(BLOCK), json.dumps(base), json.dumps(described))
    return {**dict(zip(_KEYS, texts, strict=True)), "checksum": _digest(texts)}


def read_info(metadata: Mapping[str, str], records: Mapping[str, TensorRecord], where: str) -> FileInfo:
    """Check and read one file's metadata.

    Args:
        metadata: of the file's header.
        records: its tensors.
        where: the file, for messages.

    Raises:
        CheckpointError: it is of another version, damaged, or does not fit the tensors.
    """
    version = metadata.get(VERSION_KEY)
    if version != VERSION:
        raise CheckpointError(
            f"{where}: packed delta of format version {version!r:.40}, version {VERSION} is read here; "
            "use the expo-serve that wrote it, or pack it anew"
        )
    texts = tuple(metadata.get(key, "") for key in _KEYS)
    if _digest(texts) != metadata.get("checksum", ""):
        raise CheckpointError(f"{where}: the packed delta's header is damaged (wrong checksum); copy it again")
    try:
        info = _parse(texts)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: the packed delta's header does not follow its format: {error}") from None
    _check_records(info, records, where)
    return info


def _digest(texts: tuple[str, ...]) -> str:
    return f"{checksum(b''.join(text.encode(errors='surrogatepass') + bytes(1) for text in texts)):016x}"


def _parse(texts: tuple[str, ...]) -> FileInfo:
    block = int(texts[2])
    if not 0 < block <= MAX_BLOCK or block & (block - 1):
        raise ValueError(f"blocks of {block} values")
    tensors = {name: _tensor(name, entry) for name, entry in json.loads(texts[4]).items()}
    return FileInfo(int(texts[1]), block, str(json.loads(texts[3])["name"]), tensors)


def _tensor(name: str, entry: Mapping[str, Any]) -> PackedTensor:
    base = (entry["base"][0], entry["base"][1], _shape(entry["base"][2])) if entry["base"] is not None else None
    tensor = PackedTensor(
        name, entry["dtype"], _shape(entry["shape"]), base, entry["extrapolated"] is True, entry["table"]
    )
    if not _is_sound(tensor):
        raise ValueError(f"tensor {name!r:.200}: {entry!r:.200}")
    return tensor


def _is_sound(tensor: PackedTensor) -> bool:
    """Whether there can be such a tensor: what was signed with a checksum may still be nonsense."""
    base = tensor.base
    texts = (tensor.dtype, tensor.table, *(base[:2] if base else ()))
    if not all(isinstance(text, str) for text in texts):
        return False
    dtypes = {tensor.dtype, *((base[1],) if base else ())}
    allowed = FLOAT_DTYPES if tensor.extrapolated else DTYPES.keys() - QUANTISED_DTYPES
    return dtypes <= allowed and (base is None or grows_into(base[2], tensor.shape))


def _shape(sizes: Any) -> tuple[int, ...]:
    if len(sizes) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**62 for size in sizes):
        raise ValueError(f"shape {sizes!r:.100}")
    if math.prod(max(size, 1) for size in sizes) >= 2**63:  # some readers multiply before they meet a zero
        raise ValueError(f"shape {sizes!r:.100}")
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
    """A tensor's table, by block."""

    base: list[int]
    """Checksums of base's bytes."""
    packed: list[int]
    """Checksums of the bytes here."""
    codings: list[int]
    parts: list[tuple[int, ...]]
    """Sizes in bytes."""
    offsets: list[int]
    """Of the first byte within the tensor's; one more for the end."""


def read_table(raw: bytes, tensor: PackedTensor, block: int, record: TensorRecord) -> Table:
    """A tensor's table, checked.

    Args:
        raw: the table's bytes.
        tensor: whose.
        block: values in a block.
        record: where its bytes lie.

    Raises:
        CheckpointError: it is damaged.
    """
    if f"{checksum(raw):016x}" != tensor.table:
        raise CheckpointError(
            f"{record.file}: tensor {tensor.name!r}: its table is damaged (wrong checksum); copy it again"
        )
    entries = list(TABLE_ENTRY.iter_unpack(raw))
    offsets = [len(raw) + end for end in accumulate((sum(entry[3:]) for entry in entries), initial=0)]
    if len(entries) != tensor.count(block) or offsets[-1] != record.nbytes:
        raise CheckpointError(f"{record.file}: tensor {tensor.name!r}: its table does not fit its bytes")
    return Table(
        base=[entry[0] for entry in entries],
        packed=[entry[1] for entry in entries],
        codings=[entry[2] for entry in entries],
        parts=[entry[3:] for entry in entries],
        offsets=offsets,
    )
