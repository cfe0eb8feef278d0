"""Reads and checks the header of one safetensors file, before any of its data is read.

Format (https://github.com/huggingface/safetensors#format): eight bytes, the header's length N as
an unsigned little-endian integer; N bytes of JSON, an object that maps each tensor's name to
``{"dtype", "shape", "data_offsets": [begin, end]}`` (``__metadata__`` maps strings to strings);
then the data, to which the offsets are relative. The checks are those of the format's own library, and two that it
leaves out: duplicate names, and limits on the size of the header.
"""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from expo_serve.checkpoint.records import DTYPES, SUB_BYTE_DTYPES, JsonObject, TensorRecord
from expo_serve.errors import CheckpointError
from expo_serve.shown import shown

MAX_HEADER_BYTES = 64 * 2**20
MAX_TENSORS = 500_000
MAX_NAME = 500
"""Characters of a tensor's name; wrappers of training make the longest ones."""
MAX_DIMENSIONS = 64  # torch's own limit; the product of millions of sizes would take hours
_MAX_BYTES = 2**63 - 1
_LENGTH_BYTES = 8
OTHER_FILES = {
    b"version ": "it is a pointer of Git LFS, without the weights; run git lfs pull, or download the file again",
    b"<!doctyp": "it is a web page; download the file again, by a link to the file itself",
    b"<html": "it is a web page; download the file again, by a link to the file itself",
    b"\x00\x05\x16\x07": "it holds a Mac's attributes of another file (AppleDouble); remove it",
    b"gguf": "it is a GGUF file, which is quantised most often; give a checkpoint in safetensors",
}
"""What is found in the place of weights, by its first bytes in small letters."""


@dataclass(frozen=True, slots=True)
class Header:
    """The checked header of one file. ``digest`` is a hash of its raw bytes and of the size of the data."""

    tensors: dict[str, TensorRecord]
    digest: str
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of one safetensors file; no tensor data is read.

    Raises:
        CheckpointError: the file is not a regular file, is truncated, or its header breaks the format.
    """
    raw, data_bytes = _read_raw(path)
    entries, metadata = _parse(path, raw)
    start = _LENGTH_BYTES + len(raw)
    tensors = {name: _record(path, name, entry, start) for name, entry in entries.items()}
    _check_layout(path, tensors, start, data_bytes)
    digest = sha256(raw + data_bytes.to_bytes(8, "little")).hexdigest()
    return Header(tensors, digest, metadata)


def _read_raw(path: Path) -> tuple[bytes, int]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: expected a regular file; it was not opened")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(_LENGTH_BYTES)
            if not prefix:
                raise CheckpointError(f"{path}: file is empty; copy or download it again")
            if len(prefix) < _LENGTH_BYTES:
                raise CheckpointError(
                    f"{path}: not a safetensors file: expected at least {_LENGTH_BYTES} bytes, found {size}"
                )
            length = int.from_bytes(prefix, "little")
            available = size - _LENGTH_BYTES
            if length > min(available, MAX_HEADER_BYTES):
                raise CheckpointError(f"{path}: {_length_problem(prefix, length, available)}")
            return file.read(length), available - length
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _is_pickle(prefix: bytes) -> bool:
    """Recognise a zip archive, or a pickle's protocol mark and first opcode.

    In a safetensors file these bytes belong to the header's length, where they would mean an absurd one.
    """
    return prefix.startswith(b"PK\x03\x04") or (prefix[0] == 0x80 and 2 <= prefix[1] <= 5 and prefix[2] != 0)


def _length_problem(prefix: bytes, length: int, available: int) -> str:
    if _is_pickle(prefix):
        return (
            "not a safetensors file: it looks like a PyTorch pickle, which is never opened; convert it to safetensors"
        )
    if other := next((what for start, what in OTHER_FILES.items() if prefix.lower().startswith(start)), None):
        return f"not a safetensors file: {other}"
    if length > MAX_HEADER_BYTES:
        return f"header length is {length} bytes, the limit is {MAX_HEADER_BYTES}; is this a safetensors file?"
    return f"file is truncated: the header needs {length} bytes, {available} are left; copy or download it again"


def _parse(path: Path, raw: bytes) -> tuple[JsonObject, dict[str, str]]:
    """Return the tensors' entries and the metadata."""
    if raw.count(b'"data_offsets"') > MAX_TENSORS:
        raise CheckpointError(f"{path}: expected at most {MAX_TENSORS} tensors in the header, found more")
    try:
        # Strictly UTF-8: given bytes, json would guess other encodings too, which no other reader of the format does.
        header = json.loads(raw.decode(), object_pairs_hook=_unique_keys)
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{path}: header has the name {error} twice") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header must be a JSON object, found {type(header).__name__}")
    metadata = header.pop("__metadata__", None)
    if not (metadata is None or (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values()))):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings, found {shown(metadata, 200)}")
    return header, metadata or {}


class _DuplicateKeyError(Exception):
    pass


def _unique_keys(pairs: list[tuple[str, object]]) -> JsonObject:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _DuplicateKeyError(shown(twice, 200))
    return result


def is_size(value: object) -> bool:
    """Return whether a value is an integer that can be a size or an offset in a file."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_BYTES


def check_name(where: str, name: str) -> None:
    """Check the name of a tensor, which messages and logs will show.

    Raises:
        CheckpointError: it is too long, or has characters that cannot be printed.
    """
    if not name.isprintable():
        raise CheckpointError(f"{where}: the name contains unprintable characters")
    if len(name) > MAX_NAME:
        raise CheckpointError(f"{where}: the name has {len(name)} characters, expected at most {MAX_NAME}")


def _record(path: Path, name: str, entry: object, start: int) -> TensorRecord:
    where = f"{path}: tensor {name!r:.200}"
    check_name(where, name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, found {shown(entry, 200)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if isinstance(dtype, str) and dtype in SUB_BYTE_DTYPES:
        raise CheckpointError(
            f"{where} is quantised ({dtype}), so its numbers cannot be extrapolated; give the unquantised checkpoint"
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{where}: dtype {shown(dtype, 200)} is not supported; expected one of {', '.join(DTYPES)}"
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(is_size(size) for size in shape):
        raise CheckpointError(
            f"{where}: shape must be a list of at most {MAX_DIMENSIONS} sizes, found {shown(shape, 200)}"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(value) for value in offsets):
        raise CheckpointError(f"{where}: data_offsets must be [begin, end], found {shown(offsets, 200)}")
    begin, end = offsets
    record = TensorRecord(name, path, start + begin, dtype, tuple(shape))
    if math.prod(max(size, 1) for size in shape) > _MAX_BYTES:  # some readers overflow before they reach a zero
        raise CheckpointError(f"{where}: shape {shape!r:.200} is too large")
    if end - begin != record.nbytes:
        raise CheckpointError(
            f"{where}: {dtype} of shape {list(shape)} takes {record.nbytes} bytes, data_offsets give {end - begin}"
        )
    return record


def _check_layout(path: Path, tensors: dict[str, TensorRecord], start: int, data_bytes: int) -> None:
    position = start
    for record in sorted(tensors.values(), key=lambda record: (record.offset, record.nbytes)):
        if record.offset != position:
            problem = "overlaps the previous tensor" if record.offset < position else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {record.name!r} {problem}: "
                f"expected to begin at byte {position}, begins at {record.offset}"
            )
        position += record.nbytes
    expected, actual = position, start + data_bytes
    if actual != expected:
        problem = "is truncated" if actual < expected else "has bytes after the last tensor"
        raise CheckpointError(
            f"{path}: file {problem}: expected {expected} bytes, actual {actual}; copy or download it again"
        )
