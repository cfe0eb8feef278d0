"""Which files of a checkpoint may be opened: regular ones within its folder, and links to places that are allowed.

A folder that was downloaded must not be able to name other files of this machine. Links lead out of it all the same
where one copy of the weights serves several folders, or a hub cache keeps its blobs on another disk.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from expo_serve.config import Source
from expo_serve.errors import CheckpointError
from expo_serve.shown import plain, shown

HUB_FOLDER = re.compile(r"models--(?P<name>.+)")
"""What the hub's cache calls the folder of a repository."""


def hub_repository(folder: Path) -> tuple[Path, str] | None:
    """Return the repository folder and the hub id of a snapshot in the hub cache; None for other folders."""
    for snapshots in folder.parents:
        repository = snapshots.parent
        if snapshots.name == "snapshots" and (match := HUB_FOLDER.fullmatch(repository.name)):
            return repository, match["name"].replace("--", "/")
    return None


def is_file(path: Path) -> bool:
    """Return whether a file is there, behind links too; a link that cannot be followed is none."""
    return os.path.isfile(path)


def check_inside(file: Path, source: Source) -> None:
    """Check that a file is regular and, after following links, in a place that is allowed.

    Args:
        file: a file in the folder of ``source``.
        source: also names the folders that links may lead to.

    Raises:
        CheckpointError: its name cannot be printed, the link is broken or leads elsewhere, or what is there is no
            regular file.
    """
    if not file.name.isprintable():
        raise CheckpointError(f"{file.parent}: {shown(file.name)} has unprintable characters in its name; rename it")
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it leads to itself"
        raise CheckpointError(f"{file}: broken link: {problem}") from None
    if not any(target.is_relative_to(root) for root in _roots(source)):
        raise CheckpointError(
            f"{file}: link leaves the checkpoint (to {plain(str(target), 1000)}); it was not opened; if it belongs to "
            f"the checkpoint, give --allow-links {plain(str(target.parent), 1000)}"
        )
    if not stat.S_ISREG(target.stat().st_mode):
        raise CheckpointError(f"{file}: expected a regular file; it was not opened")


def _roots(source: Source) -> Iterator[Path]:
    folder = Path(source.path).resolve()
    yield folder
    if repository := hub_repository(folder):
        yield repository[0]
        yield (repository[0] / "blobs").resolve()  # may be a link to another disk
    yield from (Path(root).resolve() for root in source.links)
