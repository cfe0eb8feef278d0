"""Opens a checkpoint: checks its files and finds the record of each tensor. Reads headers only, no tensor data."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path

from expo_serve.checkpoint.header import Header, read_header
from expo_serve.checkpoint.records import QUANTISED_DTYPES, JsonObject, Operand, TensorRecord, total_bytes
from expo_serve.checkpoint.source import INDEX_FILE, hub_repository, read_config, read_weight_map
from expo_serve.config import Source
from expo_serve.errors import CheckpointError

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Files in which quantisers described their work before config.json had a key for it; some still write them.
_QUANTISATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


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
    config = read_config(operand, source)
    refuse_quantised(operand, config, Path(source.path))
    opened = open_files(operand, source, tuple(_weight_files(operand, Path(source.path))))
    return Checkpoint(operand, opened.source, config, opened.files, opened.tensors)


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
    files = files or tuple(_weight_files(operand, folder))
    for file in files:
        _check_inside(file, folder)
    headers = {file: read_header(file) for file in files}
    tensors = _join(operand, headers)
    _check_index(folder, tensors)
    fingerprint = _fingerprint(headers)
    if source.fingerprint not in ("", fingerprint):
        raise CheckpointError(
            f"{operand}: {folder} has changed since the server was started: "
            f"expected fingerprint {source.fingerprint}, found {fingerprint}; restart the server"
        )
    source = source.model_copy(update={"fingerprint": fingerprint})
    return OpenedFiles(source, files, tensors, {file: header.metadata for file, header in headers.items()})


def refuse_quantised(operand: Operand, config: JsonObject, folder: Path) -> None:
    """Refuse a quantised checkpoint: its numbers cannot be extrapolated.

    Raises:
        CheckpointError: the config or a quantiser's own file says that the checkpoint is quantised.
    """
    method = _quantisation(config) or next((name for name in _QUANTISATION_FILES if (folder / name).exists()), None)
    if method:
        raise CheckpointError(
            f"{operand}: the checkpoint is quantised ({method}), so its numbers cannot be extrapolated; "
            "give the unquantised one, and quantise it while loading with vLLM's --quantization"
        )


def _quantisation(config: JsonObject) -> str | None:
    """Return the method of quantisation that the config or a part of it (such as ``text_config``) names."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if settings := part.get("quantization_config") or part.get("compression_config"):
            return str(settings.get("quant_method", "unknown")) if isinstance(settings, dict) else "unknown"
    return None


def _weight_files(operand: Operand, folder: Path) -> Iterator[Path]:
    """Yield the files that vLLM would read: those that the index names, or else every safetensors file."""
    index = folder / INDEX_FILE
    if index.is_symlink() or index.exists():
        _check_inside(index, folder)
        for shard in sorted(set(read_weight_map(index).values())):
            yield _present(folder / shard, index)
        return
    found = sorted(folder.glob("*.safetensors"))
    # The publisher's own format may be stored beside the Hugging Face one and repeat it under other names.
    files = [file for file in found if not fnmatch(file.name, "consolidated*")] or found
    if not files:
        raise CheckpointError(f"{operand}: {_nothing_to_read(folder)}")
    yield from files


def _nothing_to_read(folder: Path) -> str:
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds only pickle files ({', '.join(pickles[:3])}), which can run code and are never "
            "opened; convert them to safetensors"
        )
    if any(folder.glob("*.gguf")):
        return f"{folder} holds a GGUF file: quantised checkpoints cannot be extrapolated; give one in safetensors"
    return f"{folder} holds no safetensors file; give the folder of a checkpoint"


def _present(shard: Path, index: Path) -> Path:
    if not shard.exists() and not shard.is_symlink():
        raise CheckpointError(
            f"{index}: names {shard.name!r}, which is missing in {shard.parent}; copy or download it again"
        )
    return shard


def _check_inside(file: Path, folder: Path) -> None:
    """Accept regular files only, and links only within the folder or within the same repository of the hub cache."""
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{file}: broken link: {error}") from None
    root = folder.resolve()
    repository = hub_repository(root)
    if not target.is_relative_to(repository[0] if repository else root):
        raise CheckpointError(f"{file}: link leaves the checkpoint (to {target}); it was not opened")
    if not stat.S_ISREG(target.stat().st_mode):
        raise CheckpointError(f"{file}: expected a regular file; it was not opened")


def _join(operand: Operand, headers: dict[Path, Header]) -> dict[str, TensorRecord]:
    tensors: dict[str, TensorRecord] = {}
    for file, header in headers.items():
        for record in sorted(header.tensors.values(), key=lambda record: record.offset):
            if record.name in tensors:
                raise CheckpointError(
                    f"{operand}: tensor {record.name!r} is stored in two files that are both read: "
                    f"{tensors[record.name].file.name} and {file.name}; remove the one that does not belong"
                )
            if record.dtype in QUANTISED_DTYPES:
                raise CheckpointError(
                    f"{operand}: tensor {record.name!r} in {file} is quantised ({record.dtype}); give the "
                    "unquantised checkpoint, and quantise it while loading with vLLM's --quantization"
                )
            tensors[record.name] = record
    if not tensors:
        raise CheckpointError(f"{operand}: no tensor in {', '.join(str(file) for file in headers)}")
    return tensors


def _check_index(folder: Path, tensors: dict[str, TensorRecord]) -> None:
    index = folder / INDEX_FILE
    if not index.exists():
        return
    for name, shard in read_weight_map(index).items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(
                f"{index}: tensor {name!r} is mapped to {shard!r}, which does not contain it; copy or download it again"
            )


def _fingerprint(headers: dict[Path, Header]) -> str:
    digests = "".join(f"{file.name}\0{header.digest}\n" for file, header in headers.items())
    return sha256(digests.encode()).hexdigest()[:16]
