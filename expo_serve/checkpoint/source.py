"""Sources: from a folder, or a hub id and a revision, to a real folder and a commit; and the JSON files in it."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path, PurePosixPath

from expo_serve.checkpoint.file_names import ADAPTER_CONFIG
from expo_serve.checkpoint.hub import hub_endpoint, hub_source
from expo_serve.checkpoint.hub_files import HubAccess, Repository, no_subfolder
from expo_serve.checkpoint.json_files import read_json, read_weight_map
from expo_serve.checkpoint.links import HUB_FOLDER, check_inside, hub_repository, is_file
from expo_serve.checkpoint.records import JsonObject, Operand
from expo_serve.checkpoint.spellings import right_spelling
from expo_serve.config import Source
from expo_serve.errors import CheckpointError, SourceError
from expo_serve.shown import plain

__all__ = [
    "TOKENIZER_FILES",
    "HubAccess",
    "adapter_subfolders",
    "find_source",
    "hub_repository",
    "is_on_network",
    "read_config",
    "read_weight_map",
]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")
"""Files by which a tokenizer is recognised, in the order in which they are looked for."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_MAX_FOLDERS = 1000
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_NETWORK_TYPES = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4"}
    | {"smb3", "smbfs", "virtiofs", "wekafs"}
)


def find_source(
    operand: Operand, given: str, revision: str | None, hub: HubAccess, *, subfolder: str | None = None
) -> Source:
    """Find a checkpoint or delta; a hub id is downloaded, or taken from the cache when offline.

    Args:
        operand: ``base``, ``aligned`` or ``delta``, for messages.
        given: a folder or a hub id.
        revision: branch, tag or commit; for hub ids only.
        hub: token and cache folder.
        subfolder: folder in ``given`` that holds the files; None for ``given`` itself.

    Raises:
        SourceError: there is no such folder or repository, or it cannot be reached.
        CheckpointError: the index of a repository's shards is damaged.
    """
    if not given:
        raise SourceError(f"{operand} is empty: expected a folder or a hub id")
    subfolder = _inner_path(operand, subfolder) if subfolder is not None else None
    try:
        folder = Path(given).expanduser()
        if folder.is_dir():
            return _local_source(operand, folder, revision, subfolder)
        if folder.exists():
            raise SourceError(f"{operand}: {given!r} is a file; give the folder that holds the checkpoint")
    except (OSError, RuntimeError, ValueError) as error:  # too long, NUL, permission denied, ~user unknown
        raise SourceError(f"{operand}: folder {given!r:.200} cannot be found: {error}") from None
    _refuse_other_spellings(operand, given)
    return hub_source(Repository(operand, given, revision, hub, subfolder))


def adapter_subfolders(folder: Path) -> list[str]:
    """Return the subfolders that hold an adapter, relative to ``folder``, at most two levels below it; sorted.

    Args:
        folder: folder whose visible subfolders are looked through.
    """
    found = []
    for pattern in ("*", "*/*"):
        for path in islice(folder.glob(f"{pattern}/"), _MAX_FOLDERS):
            parts = path.relative_to(folder).parts
            if not any(part.startswith(".") for part in parts) and is_file(path / ADAPTER_CONFIG):
                found.append(plain("/".join(parts), 1000))
    return sorted(found)


def _inner_path(operand: Operand, subfolder: str) -> str | None:
    """Return a subfolder's path in its usual form; None if it is the folder itself."""
    path = PurePosixPath(subfolder)
    if not subfolder or path.is_absolute() or ".." in path.parts or set(subfolder) & set("\\\0\n"):
        raise SourceError(
            f"{operand}: subfolder {subfolder!r}: expected the path of a folder inside the source, such as 'adapter'"
        )
    return path.as_posix() if path.parts else None


def _refuse_other_spellings(operand: Operand, given: str) -> None:
    """Refuse what is no hub id, with the right spelling where it can be told."""
    is_hub_id = _HUB_ID.fullmatch(given) and not HUB_FOLDER.fullmatch(given)
    if not is_hub_id and (spelling := right_spelling(operand, given, hub_endpoint())):
        raise SourceError(f"{operand}: {given!r} is neither a folder nor a hub id; give {spelling}")
    if _URL.match(given):
        raise SourceError(
            f"{operand}: {given!r} is not supported: expected a folder or a hub id; download or mount it first"
        )
    if not _HUB_ID.fullmatch(given):
        raise SourceError(f"{operand}: folder {given!r} does not exist")


def _local_source(operand: Operand, folder: Path, revision: str | None, subfolder: str | None) -> Source:
    path = folder.resolve()
    inner = _inside(operand, path, subfolder) if subfolder else path
    repository = hub_repository(path)
    if repository and path.parent.name == "snapshots":
        commit = path.name
        if revision not in (None, commit):
            raise SourceError(f"{operand}: {path} is commit {commit}, but revision {revision!r} was requested")
        name = f"{repository[1]}/{subfolder}" if subfolder else repository[1]
        return Source(name=name, path=str(inner), revision=commit)
    if (match := HUB_FOLDER.fullmatch(path.name)) and (path / "snapshots").is_dir():
        raise SourceError(
            f"{operand}: {path} is a repository of the hub cache, not a checkpoint; give "
            f"--{operand} {match['name'].replace('--', '/')}, or one of the folders in {path / 'snapshots'}"
        )
    if revision is not None:
        raise SourceError(
            f"{operand}: revision {revision!r} was given, but {str(folder)!r} is a folder; leave the revision out"
        )
    return Source(name=inner.name or "model", path=str(inner))


def _inside(operand: Operand, folder: Path, subfolder: str) -> Path:
    """Return a subfolder, which must not lead out of its folder by a link."""
    path = (folder / subfolder).resolve()
    if not path.is_dir():
        raise SourceError(f"{operand}: {no_subfolder(str(folder), subfolder, adapter_subfolders(folder))}")
    if not path.is_relative_to(folder):
        raise SourceError(f"{operand}: subfolder {subfolder!r} leads out of {folder} (to {path}); give {path} itself")
    return path


def read_config(operand: str, source: Source, name: str = "config.json") -> JsonObject:
    """Read a checkpoint's config.json, or another of its JSON files.

    Args:
        operand: ``base``, ``aligned`` or ``delta``, for messages.
        source: the folder.
        name: the file in it.

    Raises:
        CheckpointError: the file is missing, lies elsewhere, cannot be read or is not a JSON object.
    """
    path = Path(source.path) / name
    if not is_file(path):
        raise CheckpointError(f"{operand}: {source.path} has no {name}; give the folder of a checkpoint")
    check_inside(path, source)
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
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
