"""Opens a checkpoint: checks its files and finds the record of each tensor. Reads headers only, no tensor data."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from hashlib import sha256
from itertools import islice
from pathlib import Path

from expo_serve.checkpoint.file_names import ADAPTER_CONFIG, INDEX_FILE, PICKLE_INDEX
from expo_serve.checkpoint.header import Header, read_header
from expo_serve.checkpoint.links import check_inside, is_file
from expo_serve.checkpoint.pickle_index import read_pickle_header
from expo_serve.checkpoint.quantisation import refuse_quantised, refuse_quantised_tensors
from expo_serve.checkpoint.records import JsonObject, Operand, TensorRecord, total_bytes
from expo_serve.checkpoint.source import read_config, read_weight_map
from expo_serve.checkpoint.wrappers import bare_names
from expo_serve.config import Source
from expo_serve.errors import CheckpointError
from expo_serve.shown import plain, shown

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,9})-of-(?P<count>\d{1,9})\.(?P<suffix>safetensors|bin)")


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint."""

    operand: Operand
    source: Source
    config: JsonObject
    files: tuple[Path, ...]
    tensors: dict[str, TensorRecord]
    """By name, in the order of the files and of the data in each file."""

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return total_bytes(self.tensors.values())


def open_checkpoint(operand: Operand, source: Source) -> Checkpoint:
    """Read and check a checkpoint's config, index and headers.

    Args:
        operand: ``base`` or ``aligned``, for messages.
        source: its folder; if it has a fingerprint, the files must have the same.

    Raises:
        CheckpointError: the checkpoint is quantised, or a file breaks the format, the index or the fingerprint.
    """
    _refuse_adapter(operand, Path(source.path))
    config = read_config(operand, source)
    refuse_quantised(operand, config, Path(source.path))
    opened = open_files(operand, source)
    return Checkpoint(operand, opened.source, config, opened.files, opened.tensors)


def _refuse_adapter(operand: Operand, folder: Path) -> None:
    """Refuse the folder of an adapter alone, which has no config of a model."""
    if is_file(folder / ADAPTER_CONFIG) and not is_file(folder / "config.json"):
        advice = "give it as --delta" if operand == "aligned" else "give the model that it was trained on"
        raise CheckpointError(f"{operand}: {folder} holds an adapter, not a checkpoint; {advice}")


@dataclass(frozen=True)
class OpenedFiles:
    """Checked safetensors files: ``source`` with their fingerprint, and the content of their headers."""

    source: Source
    files: tuple[Path, ...]
    tensors: dict[str, TensorRecord]
    metadata: dict[Path, dict[str, str]]


def open_files(operand: Operand, source: Source, files: tuple[Path, ...] = ()) -> OpenedFiles:
    """Read and check the headers of a folder's safetensors files.

    Args:
        operand: ``base``, ``aligned`` or ``delta``, for messages.
        source: the folder; if it has a fingerprint, the files must have the same.
        files: the files to open; by default those that the index names, or all if there is no index.

    Raises:
        CheckpointError: a file breaks the format, the index or the fingerprint.
    """
    folder = Path(source.path)
    index = _read_index(source) if not files else {}
    files = files or tuple(_weight_files(operand, source))
    for file in files:
        check_inside(file, source)
    headers = {file: _read_header(file, source) for file in files}
    tensors = _join(operand, headers, index)
    refuse_quantised_tensors(operand, tensors.values())
    _check_index(_index_file(source), index, tensors)
    tensors = _under_bare_names(tensors)
    fingerprint = _fingerprint(headers)
    if source.fingerprint not in ("", fingerprint):
        raise CheckpointError(
            f"{operand}: {folder} has changed since the server was started: "
            f"expected fingerprint {source.fingerprint}, found {fingerprint}; restart the server"
        )
    source = source.model_copy(update={"fingerprint": fingerprint})
    return OpenedFiles(source, files, tensors, {file: header.metadata for file, header in headers.items()})


def _read_index(source: Source) -> dict[str, str]:
    """Return the file of each tensor by the index; empty if there is none."""
    index = _index_file(source)
    if not os.path.lexists(index):
        return {}
    check_inside(index, source)
    return read_weight_map(index)


def _index_file(source: Source) -> Path:
    folder = Path(source.path)
    return folder / (PICKLE_INDEX if _reads_pickles(source) else INDEX_FILE)


def _reads_pickles(source: Source) -> bool:
    """Return whether a source has no safetensors files, and its pickles may be walked over."""
    return source.pickles and not any(Path(source.path).glob("*.safetensors"))


def _read_header(file: Path, source: Source) -> Header:
    return read_pickle_header(file) if source.pickles and file.suffix == ".bin" else read_header(file)


def _weight_files(operand: Operand, source: Source) -> Iterator[Path]:
    """Yield the files that vLLM would read: those that the index names, or else every safetensors file."""
    folder = Path(source.path)
    if index := _read_index(source):
        for shard in sorted(set(index.values())):
            yield _present(folder / shard, _index_file(source))
        return
    if _reads_pickles(source) and (pickles := sorted(folder.glob("pytorch_model*.bin"))):
        _refuse_missing_shards(operand, pickles)
        yield from pickles
        return
    found = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))
    # The publisher's own format may be stored beside the Hugging Face one and repeat it under other names.
    files = [file for file in found if not fnmatch(file.name, "consolidated*")] or found
    if not files:
        raise CheckpointError(f"{operand}: {_nothing_to_read(folder)}")
    _refuse_missing_shards(operand, files)
    yield from files


def _refuse_missing_shards(operand: Operand, files: Iterable[Path]) -> None:
    """Without an index only their names tell that shards are missing: ``model-00001-of-00003.safetensors``."""
    numbers: defaultdict[tuple[str, str, str], set[int]] = defaultdict(set)
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            numbers[match["stem"], match["count"], match["suffix"]].add(int(match["number"]))
    for (stem, count, suffix), there in numbers.items():
        wanted = range(1, int(count) + 1)  # the number may be absurd
        if missing := len(wanted) - sum(number in wanted for number in there):
            first = islice((number for number in wanted if number not in there), 3)
            names = ", ".join(f"{stem}-{number:0{len(count)}}-of-{count}.{suffix}" for number in first)
            raise CheckpointError(
                f"{operand}: {next(iter(files)).parent} holds a part of a checkpoint: {missing} of {int(count)} "
                f"shards are missing ({names}{', ...' if missing > 3 else ''}); copy or download them again"
            )


def _nothing_to_read(folder: Path) -> str:
    pickles = sorted(plain(file.name) for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds only pickle files ({', '.join(pickles[:3])}), which can run code and are not "
            "opened; convert them to safetensors, or give --allow-pickle-index: it finds the tensors without running "
            "anything"
        )
    if any(folder.glob("*.gguf")):
        return f"{folder} holds a GGUF file: quantised checkpoints cannot be extrapolated; give one in safetensors"
    return f"{folder} holds no safetensors file; give the folder of a checkpoint"


def _present(shard: Path, index: Path) -> Path:
    if not os.path.lexists(shard):
        raise CheckpointError(
            f"{index}: names {shard.name!r}, which is missing in {shard.parent}; copy or download it again"
        )
    return shard


def _join(operand: Operand, headers: dict[Path, Header], index: Mapping[str, str]) -> dict[str, TensorRecord]:
    """Return the tensors of all files. Where one is in several, the index decides."""
    tensors: dict[str, TensorRecord] = {}
    for file, header in headers.items():
        for record in sorted(header.tensors.values(), key=lambda record: record.offset):
            if index.get(record.name, file.name) != file.name:
                continue
            if record.name in tensors:
                raise CheckpointError(
                    f"{operand}: tensor {record.name!r} is stored in two files that are both read: "
                    f"{tensors[record.name].file.name} and {file.name}; remove the one that does not belong"
                )
            tensors[record.name] = record
    if not tensors:
        raise CheckpointError(f"{operand}: no tensor in {', '.join(str(file) for file in [*headers][:3])}")
    return tensors


def _check_index(index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorRecord]) -> None:
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{index}: tensor {shown(name, 200)} is mapped to {shard!r}, which does not contain it; copy or "
                "download it again"
            )


def _under_bare_names(tensors: dict[str, TensorRecord]) -> dict[str, TensorRecord]:
    bare = bare_names(tensors)
    return {bare[name]: replace(record, name=bare[name]) for name, record in tensors.items()}


def _fingerprint(headers: dict[Path, Header]) -> str:
    digests = "".join(f"{file.name}\0{header.digest}\n" for file, header in headers.items())
    return sha256(digests.encode()).hexdigest()[:16]
