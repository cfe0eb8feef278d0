"""Copies the companion files of a checkpoint: config, tokenizer, templates, code, and the modules of its subfolders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from expo_serve.checkpoint.companions import is_companion
from expo_serve.checkpoint.links import check_inside
from expo_serve.config import Source


def copy_companion_files(source: Source, folder: Path, leave_out: Collection[str] = ()) -> None:
    """Copy every companion file of ``source`` into ``folder``, under the same path.

    Args:
        source: a checkpoint.
        folder: existing folder to copy into.
        leave_out: paths of further files to skip.

    Raises:
        OSError: a file cannot be read or written.
        CheckpointError: a file is a link out of the checkpoint.
    """
    for path in _companions(Path(source.path)):
        if str(path) in leave_out:
            continue
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        file = Path(source.path, path)
        check_inside(file, source)
        shutil.copyfile(file, folder / path)


def _companions(source: Path) -> Iterator[PurePosixPath]:
    """Yield the paths of companion files within a folder, in order; links to folders are not followed."""
    for place, folders, names in os.walk(source):
        folders.sort()
        inner = PurePosixPath(Path(place).relative_to(source))
        for name in sorted(names):
            if is_companion(inner / name) and Path(place, name).is_file():
                yield inner / name
