"""Sources: from a folder, or a hub id and a revision, to a real folder and a commit; and the JSON files in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from expo_serve.checkpoint.records import JsonObject, Operand
from expo_serve.config import Source
from expo_serve.errors import CheckpointError, SourceError

INDEX_FILE = "model.safetensors.index.json"
# Companion files of the weights: config, tokenizer, chat template, remote code.
_COMPANION_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")
"""Files by which a tokenizer is recognised, in the order in which they are looked for."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FOLDER = re.compile(r"models--(?P<name>.+)")
_MAX_FILE_NAME_BYTES = 255
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_NETWORK_TYPES = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4"}
    | {"smb3", "smbfs", "virtiofs", "wekafs"}
)

T = TypeVar("T")


@dataclass(frozen=True)
class HubAccess:
    """Access to the hub."""

    token: str | bool | None = None
    """None for the stored token, if there is one; True to require it."""
    cache_dir: str | None = None
    """Folder for downloads; None for the hub's own cache."""


def find_source(operand: Operand, given: str, revision: str | None, hub: HubAccess) -> Source:
    """Find a checkpoint or delta; a hub id is downloaded, or taken from the cache when offline.

    Args:
        operand: ``base``, ``aligned`` or ``delta``, for messages.
        given: a folder or a hub id.
        revision: branch, tag or commit; for hub ids only.
        hub: token and cache folder.

    Raises:
        SourceError: there is no such folder or repository, or it cannot be reached.
    """
    if _URL.match(given):
        raise SourceError(
            f"{operand}: {given!r} is not supported: expected a folder or a hub id; download or mount it first"
        )
    if not given:
        raise SourceError(f"{operand} is empty: expected a folder or a hub id")
    try:
        folder = Path(given).expanduser()
        if folder.is_dir():
            return _local_source(operand, folder, revision)
        if folder.exists():
            raise SourceError(f"{operand}: {given!r} is a file; give the folder that holds the checkpoint")
    except (OSError, RuntimeError) as error:  # name too long, permission denied, ~user unknown
        raise SourceError(f"{operand}: folder {given!r:.200} cannot be found: {error}") from None
    if not _HUB_ID.fullmatch(given):
        raise SourceError(f"{operand}: folder {given!r} does not exist")
    return _hub_source(operand, given, revision, hub)


def hub_repository(folder: Path) -> tuple[Path, str] | None:
    """Return the repository folder and the hub id of a snapshot in the hub cache; None for other folders."""
    for snapshots in folder.parents:
        repository = snapshots.parent
        if snapshots.name == "snapshots" and (match := _HUB_FOLDER.fullmatch(repository.name)):
            return repository, match["name"].replace("--", "/")
    return None


def _local_source(operand: Operand, folder: Path, revision: str | None) -> Source:
    path = folder.resolve()
    repository = hub_repository(path)
    if repository and path.parent.name == "snapshots":
        commit = path.name
        if revision not in (None, commit):
            raise SourceError(f"{operand}: {path} is commit {commit}, but revision {revision!r} was requested")
        return Source(name=repository[1], path=str(path), revision=commit)
    if revision is not None:
        raise SourceError(
            f"{operand}: revision {revision!r} was given, but {str(folder)!r} is a folder; leave the revision out"
        )
    return Source(name=path.name or "model", path=str(path))


def _hub_source(operand: Operand, hub_id: str, revision: str | None, hub: HubAccess) -> Source:
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str], commit: str | None) -> Path:
        return Path(
            snapshot_download(
                hub_id,
                revision=commit,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                token=hub.token,
                cache_dir=hub.cache_dir,
            )
        )

    folder = _map_hub_errors(operand, hub_id, revision, lambda: fetch(list(_COMPANION_FILES), revision))
    weights = _weight_patterns(folder)
    _map_hub_errors(operand, hub_id, revision, lambda: fetch(weights, folder.name))
    return Source(name=hub_id, path=str(folder.resolve()), revision=folder.name)


def _weight_patterns(folder: Path) -> list[str]:
    """Return the files that the index names: repositories often hold a second copy of the weights."""
    index = folder / INDEX_FILE
    return sorted(set(read_weight_map(index).values())) if index.is_file() else ["*.safetensors"]


def read_weight_map(index: Path) -> dict[str, str]:
    """Read a safetensors index: a mapping from tensor names to file names.

    Raises:
        CheckpointError: the index cannot be read, is not JSON, has no weight_map, or names a file outside its folder.
    """
    content = _read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected an object 'weight_map' from tensor names to file names")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_file_name(shard):
            raise CheckpointError(
                f"{index}: tensor {tensor!r} is mapped to {shard!r}; expected the file name of a shard in this folder"
            )
    return weight_map


def _is_file_name(name: str) -> bool:
    size = len(name.encode(errors="surrogatepass"))
    return name not in (".", "..") and 0 < size <= _MAX_FILE_NAME_BYTES and not set(name) & set("/\\\0")


def _map_hub_errors(operand: Operand, hub_id: str, revision: str | None, call: Callable[[], T]) -> T:
    """Run a hub call and turn its errors into one line that names the operand."""
    from huggingface_hub import errors as hub_errors

    where = f"{operand}: {hub_id!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return call()
    except hub_errors.GatedRepoError:
        raise SourceError(f"{where} is gated: accept its terms on the hub and pass --hf-token") from None
    except hub_errors.RepositoryNotFoundError:
        raise SourceError(
            f"{where}: no such folder, and no such repository on the hub (a private one needs --hf-token)"
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise SourceError(f"{where}: the hub has no such revision") from None
    except hub_errors.LocalEntryNotFoundError:
        raise SourceError(
            f"{where}: no such folder, not in the hub cache, and the hub cannot be reached (offline?)"
        ) from None
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(f"{where}: the hub did not answer as expected: {first_line}") from None


def read_config(operand: str, source: Source, name: str = "config.json") -> JsonObject:
    """Read a checkpoint's config.json, or another of its JSON files.

    Args:
        operand: ``base``, ``aligned`` or ``delta``, for messages.
        source: the folder.
        name: the file in it.

    Raises:
        CheckpointError: the file is missing, cannot be read or is not a JSON object.
    """
    path = Path(source.path) / name
    if not path.is_file():
        raise CheckpointError(f"{operand}: {source.path} has no {name}; give the folder of a checkpoint")
    content = _read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _read_json(path: Path) -> object:
    try:
        content: object = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    return content


def is_on_network(path: Path) -> bool:
    """Return whether reads of ``path`` cross a network: a network file system, or FUSE (most often a bucket).

    Args:
        path: a file or folder; links are followed.
    """
    import psutil

    real = path.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if real.is_relative_to(mount.mountpoint)]
    # Of several mounts at the same mount point the last one is visible.
    kind = max(enumerate(mounts), key=lambda item: (len(item[1].mountpoint), item[0]), default=(0, None))[1]
    return kind is not None and (kind.fstype in _NETWORK_TYPES or kind.fstype.startswith("fuse."))
