"""Finds what a load needs of a repository in the hub's cache, for when the hub cannot be asked."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from expo_serve.checkpoint.file_names import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS, INDEX_FILE
from expo_serve.checkpoint.hub_errors import UNREACHABLE, HubFailure
from expo_serve.checkpoint.hub_files import Repository, listed, needed_files, of_subfolder, weights
from expo_serve.checkpoint.json_files import read_weight_map
from expo_serve.config import Source
from expo_serve.errors import warn

COMMIT = re.compile(r"[0-9a-f]{40}")
_MODULE_FILE = re.compile(r"\d+_\w+/[^/]+")


def from_cache(wanted: Repository, failure: HubFailure) -> Source:
    """Return the snapshot in the cache if all that a load needs is there.

    Raises:
        SourceError: it is not, or the hub's answer forbids it.
    """
    from huggingface_hub import constants

    commit = None if failure.is_final else cached_commit(wanted)
    if commit is None:
        absent = "no such folder, not in the hub cache, and " if failure.reason.startswith(UNREACHABLE) else ""
        raise wanted.refusal(_not_cached(wanted) if constants.HF_HUB_OFFLINE else absent + failure.reason)
    folder = wanted.folder(commit)
    missing = _missing(wanted, folder, known_files(wanted, commit))
    if missing:
        raise wanted.refusal(
            f"{failure.reason}; the hub cache holds only a part of it: {listed(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing in {folder}; run 'hf download {wanted.hub_id}' online"
        )
    if not constants.HF_HUB_OFFLINE:
        warn(f"{wanted.where}: {failure.reason}; the hub cache is used, commit {commit[:7]}")
    return wanted.source(commit)


def _not_cached(wanted: Repository) -> str:
    """Return the message for a repository that is not in the cache while offline."""
    others = sorted(path.name[:7] for path in wanted.storage.glob("snapshots/*"))
    there = f"no such folder, not in the hub cache ({wanted.cache})"
    if others:
        there = f"no such revision in the hub cache ({wanted.cache}), which holds {listed(others)}"
    return f"{there}, and {UNREACHABLE}: offline (HF_HUB_OFFLINE)"


def cached_commit(wanted: Repository) -> str | None:
    """Return the commit of the wanted revision that the cache holds, as a whole or in part."""
    revision = wanted.revision or "main"
    try:
        commit = revision if COMMIT.fullmatch(revision) else _ref(wanted, revision).read_text().strip()
        return commit if COMMIT.fullmatch(commit) and wanted.snapshot(commit).is_dir() else None
    except (OSError, ValueError):  # not there, or no name that a file can have
        return None


def _ref(wanted: Repository, revision: str) -> Path:
    """Return the cache's file for the commit of a branch or tag."""
    if ".." in PurePosixPath(revision).parts or PurePosixPath(revision).is_absolute():
        raise ValueError(revision)
    return wanted.storage / "refs" / revision


def remember(wanted: Repository, commit: str) -> None:
    """Write into the cache which commit the revision is, as the library does, for when the hub cannot be reached."""
    revision = wanted.revision or "main"
    if COMMIT.fullmatch(revision):
        return
    try:
        ref = _ref(wanted, revision)
        if ref.is_file() and ref.read_text() == commit:
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        new = ref.with_name(f".{ref.name}.{os.getpid()}")
        new.write_text(commit)
        new.replace(ref)
    except (OSError, ValueError):  # a cache that is mounted read-only serves all the same
        return


def known_files(wanted: Repository, commit: str) -> tuple[str, ...] | None:
    """Return the files of a commit if the cache knows them; older versions of the library do not store them."""
    import huggingface_hub

    try:
        tree = huggingface_hub.get_cached_repo_tree(wanted.hub_id, revision=commit, cache_dir=wanted.cache)
        return tuple(file.path for file in tree)
    except Exception:  # noqa: BLE001 - not stored, not readable, or no such function
        return None


def _missing(wanted: Repository, folder: Path, known: Sequence[str] | None) -> list[str]:
    """Return what a load needs and the cache does not hold.

    Args:
        wanted: the repository.
        folder: of the wanted files of its commit in the cache.
        known: all files of the commit; None if they are not known.
    """
    if known is not None:
        needed = needed_files(wanted, folder, of_subfolder(wanted, known))
        # Of a subfolder what is not a module's may have been left out by who filled the cache, and is seldom read.
        needed = [name for name in needed if "/" not in name or _MODULE_FILE.fullmatch(name)]
        return [name for name in needed if not (folder / name).exists()]
    there = sorted(path.name for path in folder.glob("*") if path.exists())
    needed = [] if wanted.operand == "delta" or ADAPTER_CONFIG in there else ["config.json"]
    if INDEX_FILE in there and not (wanted.operand == "delta" and ADAPTER_CONFIG in there):
        needed += sorted(set(read_weight_map(folder / INDEX_FILE).values()))
    elif wanted.operand == "delta" and ADAPTER_CONFIG in there:
        has_pickle = wanted.access.allow_pickles and ADAPTER_PICKLE in there
        needed += [] if has_pickle else [ADAPTER_WEIGHTS]
    elif not weights(wanted, folder, there):
        needed.append("model.safetensors (or its shards and their index)")
    return [name for name in needed if name not in there]
