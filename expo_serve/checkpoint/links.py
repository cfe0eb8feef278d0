"""Which files of a checkpoint may be opened: regular ones within its folder, and links to places that are allowed.

A folder that was downloaded must not be able to name other files of this machine. Links lead out of it all the same
where one copy of the weights serves several folders, or a hub cache keeps its blobs on another disk.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from expo_serve.checkpoint.source import hub_repository
from expo_serve.config import Source
from expo_serve.errors import CheckpointError


def check_inside(file: Path, source: Source) -> None:
    """Check that a file is regular and, after following links, in a place that is allowed.

    Args:
        file: a file in the folder of ``source``.
        source: also names the folders that links may lead to.

    Raises:
        CheckpointError: the link is broken or leads elsewhere, or what is there is no regular file.
    """
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{file}: broken link: {error}") from None
    if not any(target.is_relative_to(root) for root in _roots(source)):
        raise CheckpointError(
            f"{file}: link leaves the checkpoint (to {target}); it was not opened; if it belongs to the checkpoint, "
            f"give --allow-links {target.parent}"
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
