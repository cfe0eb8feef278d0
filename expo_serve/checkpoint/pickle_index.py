"""Finds the tensors of a PyTorch ``.bin`` file without running its pickle: where each one's values lie in the file.

Format: what torch.save writes since torch 1.6 (torch/serialization.py,
https://docs.pytorch.org/docs/stable/notes/serialization.html): a zip archive of stored entries
``<prefix>/data.pkl``, a pickle of protocol 2, ``<prefix>/data/<key>``, the raw values of one storage each, and
``<prefix>/byteorder``. Each tensor is a view of a storage. The pickle is only walked over (see ``pickle_walk``), so
that a record of a tensor needs no trust in who made the file; like a safetensors record it says where to read.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from expo_serve.checkpoint.header import MAX_DIMENSIONS, MAX_TENSORS, OTHER_FILES, Header, check_name, is_size
from expo_serve.checkpoint.pickle_values import (
    STORAGE_DTYPES,
    TORCH_DTYPES,
    UNTYPED,
    PickleRefusedError,
    Refused,
    Table,
    Tensor,
    kind_of,
)
from expo_serve.checkpoint.pickle_walk import walk
from expo_serve.checkpoint.records import DTYPES, TensorRecord
from expo_serve.checkpoint.zip_index import LOCAL_MAGIC, Entry, read_at, read_entries
from expo_serve.errors import CheckpointError

MAX_PICKLE_BYTES = 64 * 2**20
WRAPPERS = ("state_dict", "model", "module")
"""Names under which training code stores a state dict beside other things."""
_MAX_BYTES = 2**63 - 1
_MAX_BYTE_ORDER_BYTES = 16
_PREFIX_BYTES = 512
_AGAIN = "copy or download it again"
_CONVERT = "save it again with torch.save, or convert it to safetensors"


def read_pickle_header(path: Path) -> Header:
    """Find the tensors of one file that torch.save wrote; nothing of it is run and no tensor data is read.

    Args:
        path: the file: a state dict, or a dict that has one under a name of ``WRAPPERS``.

    Returns:
        A header as of a safetensors file: records with offsets into the file, in the order of the dict; records may
        share bytes (tied tensors). ``digest`` is a hash of the pickle and of the places of all entries.

    Raises:
        CheckpointError: the file is of another format, is damaged, its pickle does anything but describe a dict of
            tensors, or a tensor does not lie in one piece within its storage.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: expected a regular file; it was not opened")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            _refuse_other_formats(path, read_at(file.fileno(), 0, _PREFIX_BYTES))
            entries = read_entries(path, file.fileno(), size)
            prefix = _find_prefix(path, entries)
            _check_byte_order(path, entries.get(f"{prefix}/byteorder"), file.fileno())
            pickle = _read_pickle(path, entries[f"{prefix}/data.pkl"], file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        table = _find_tensors(path, walk(pickle))
    except PickleRefusedError as error:
        raise CheckpointError(f"{path}: data.pkl, {error}") from None
    tensors = {name: _record(path, name, value, entries, prefix) for name, value in table.items()}
    return Header(tensors, _digest(pickle, entries, size), {})


def _refuse_other_formats(path: Path, start: bytes) -> None:
    if not start:
        raise CheckpointError(f"{path}: file is empty; copy or download it again")
    if start.startswith(LOCAL_MAGIC):
        return
    for magic, what in OTHER_FILES.items():
        if start.lower().startswith(magic):
            raise CheckpointError(f"{path}: not a file of torch.save: {what}")
    if start[8:9] == b"{" and start[6:8] == b"\0\0":
        raise CheckpointError(f"{path}: it looks like a safetensors file; give it the suffix .safetensors")
    if (start[0] == 0x80 and start[1:2] in (b"\2", b"\3", b"\4", b"\5")) or start[257:262] == b"ustar":
        raise CheckpointError(
            f"{path}: it is in torch's old format, from before 1.6, whose values have no known place; load it where "
            "you trust it and save it as safetensors"
        )
    raise CheckpointError(f"{path}: not a file of torch.save: expected a zip archive, found {start[:8]!r}; {_AGAIN}")


def _find_prefix(path: Path, entries: Mapping[str, Entry]) -> str:
    """Return the folder of the archive in which everything lies."""
    pickles = [name for name in entries if name.lower().rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        found = ", ".join(f"{name!r:.200}" for name in pickles[:3]) or "none"
        raise CheckpointError(f"{path}: expected one data.pkl in the zip archive, found {found}; {_CONVERT}")
    prefix, _, name = pickles[0].partition("/")
    if not prefix or name != "data.pkl":
        raise CheckpointError(f"{path}: expected data.pkl in a folder of the archive, found {pickles[0]!r}; {_CONVERT}")
    for name in entries:
        if not name.startswith(f"{prefix}/"):
            raise CheckpointError(f"{path}: zip entry {name!r:.200} is not in the folder {prefix!r:.200}; {_CONVERT}")
        if name == f"{prefix}/constants.pkl" or name.startswith(f"{prefix}/code/"):
            raise CheckpointError(
                f"{path}: it is a TorchScript archive, which holds code; save the model's state dict as safetensors"
            )
    return prefix


def _check_byte_order(path: Path, entry: Entry | None, descriptor: int) -> None:
    if entry is None:  # torch before 2.1
        return
    found = read_at(descriptor, entry.data, min(entry.size, _MAX_BYTE_ORDER_BYTES))
    if found != b"little":
        raise CheckpointError(f"{path}: expected byte order 'little', found {found!r}; {_CONVERT} on another machine")


def _read_pickle(path: Path, entry: Entry, descriptor: int) -> bytes:
    if entry.size > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{path}: data.pkl has {entry.size} bytes, the limit is {MAX_PICKLE_BYTES}; convert it to safetensors"
        )
    return read_at(descriptor, entry.data, entry.size)


def _digest(pickle: bytes, entries: Mapping[str, Entry], size: int) -> str:
    """Hash the pickle, the place of every entry, and the file's size."""
    layout = "".join(f"{entry.name}\0{entry.data}\0{entry.size}\n" for entry in entries.values())
    return sha256(sha256(pickle).digest() + f"{layout}{size}".encode()).hexdigest()


def _find_tensors(path: Path, value: object) -> dict[str, Tensor | Refused]:
    """Return the tensors of the dict itself or, if it has none, of the one dict of tensors in it."""
    if not isinstance(value, Table):
        raise CheckpointError(f"{path}: expected a dict of tensors, found {kind_of(value)}; save the state dict alone")
    holders = [name for name, inner in value.items.items() if isinstance(inner, Table) and inner.holds_tensors]
    if len(holders) > 1 or (holders and value.holds_tensors):
        names = ", ".join(f"{name!r:.200}" for name in holders[:3])
        raise CheckpointError(
            f"{path}: expected one dict of tensors, found more ({names}{' and the outer one' * value.holds_tensors}); "
            "save the state dict alone"
        )
    if not holders:
        return _tensors_of(path, value)
    if holders[0] not in WRAPPERS:
        raise CheckpointError(
            f"{path}: expected tensors, or a dict of them under {', '.join(WRAPPERS)}, found one under "
            f"{holders[0]!r:.200}; save the state dict alone"
        )
    inner = value.items[holders[0]]
    assert isinstance(inner, Table)
    return _tensors_of(path, inner)


def _tensors_of(path: Path, table: Table) -> dict[str, Tensor | Refused]:
    if len(table) > MAX_TENSORS:
        raise CheckpointError(f"{path}: expected at most {MAX_TENSORS} tensors, found more; convert it to safetensors")
    if table.foreign_keys:
        raise CheckpointError(f"{path}: the dict of tensors has keys that are no names; save the state dict alone")
    tensors: dict[str, Tensor | Refused] = {}
    for name, value in table.items.items():
        if isinstance(value, Tensor | Refused):
            tensors[name] = value
        elif isinstance(value, Table | list | tuple):
            raise CheckpointError(
                f"{path}: {name!r:.200} is a {kind_of(value)}, expected a tensor; save the state dict alone"
            )
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensor; give the file of a model's weights")
    return tensors


def _record(path: Path, name: str, value: Tensor | Refused, entries: Mapping[str, Entry], prefix: str) -> TensorRecord:
    where = f"{path}: tensor {name!r:.200}"
    check_name(where, name)
    if isinstance(value, Refused):
        raise CheckpointError(f"{where} is {value.what}; save it as a plain tensor, or convert it to safetensors")
    if value.is_lazy:
        raise CheckpointError(
            f"{where} is stored to be conjugated or negated when loaded; save its resolved values, or convert it to "
            "safetensors"
        )
    dtype = _dtype(where, value)
    shape, stride = _sizes(where, "shape", value.size), _sizes(where, "strides", value.stride)
    if len(shape) != len(stride) or not is_size(value.offset):
        raise CheckpointError(f"{where}: expected one stride a dimension and an offset of at least 0; {_AGAIN}")
    assert isinstance(value.offset, int)
    if math.prod(max(size, 1) for size in shape) > _MAX_BYTES:
        raise CheckpointError(f"{where}: shape {shape!r:.200} is too large")
    if not _is_contiguous(shape, stride):
        raise CheckpointError(
            f"{where} does not lie in one piece (shape {shape!r:.200}, strides {stride!r:.200}: a transposed or "
            "expanded view); save it contiguous, or convert it to safetensors"
        )
    begin, nbytes = _storage(where, value, entries.get(f"{prefix}/data/{value.storage.key}"))
    if 0 in shape:  # its offset may lie behind the storage
        return TensorRecord(name, path, begin, dtype, shape)
    start = value.offset * DTYPES[dtype].itemsize
    record = TensorRecord(name, path, begin + start, dtype, shape)
    if start + record.nbytes > nbytes:
        raise CheckpointError(
            f"{where}: {record.dtype_and_shape} at byte {start} of its storage takes {record.nbytes} bytes, the "
            f"storage has {nbytes}; {_AGAIN}"
        )
    return record


def _dtype(where: str, tensor: Tensor) -> str:
    """Return the format's name of a tensor's dtype."""
    if (tensor.dtype is None) == (tensor.storage.type_name == UNTYPED):
        raise CheckpointError(f"{where}: its dtype and its storage's type contradict each other; {_AGAIN}")
    found = tensor.dtype or tensor.storage.type_name
    dtype = TORCH_DTYPES.get(found) or STORAGE_DTYPES.get(found)
    if dtype is None:
        raise CheckpointError(f"{where}: {found} is not supported; expected a dtype among {', '.join(DTYPES)}")
    return dtype


def _sizes(where: str, what: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_DIMENSIONS or not all(is_size(size) for size in value):
        raise CheckpointError(
            f"{where}: expected {what} of at most {MAX_DIMENSIONS} numbers of at least 0, found others; {_AGAIN}"
        )
    return value


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Return whether the values follow each other in the file as in the tensor; the stride of a size of 1 is free."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return 0 in shape
        expected *= size
    return True


def _storage(where: str, tensor: Tensor, entry: Entry | None) -> tuple[int, int]:
    """Return where a tensor's storage begins in the file, and its length in bytes."""
    storage = tensor.storage
    if storage.location == "meta":
        raise CheckpointError(f"{where} is a tensor on the meta device, which has no values; save the weights")
    if entry is None:
        raise CheckpointError(f"{where}: its storage {storage.key!r:.200} is not in the archive; {_AGAIN}")
    expected = storage.numel * DTYPES[STORAGE_DTYPES[storage.type_name] or "U8"].itemsize
    if expected != entry.size:
        raise CheckpointError(
            f"{where}: its storage {storage.key!r:.200} must have {expected} bytes, has {entry.size}; {_AGAIN}"
        )
    return entry.data, entry.size
