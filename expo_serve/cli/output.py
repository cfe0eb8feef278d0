"""Shared by the commands that write a folder: an output that appears only when it is complete, and progress."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from expo_serve.errors import ExpoError, UsageError, warn
from expo_serve.progress import Progress

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]B)?", re.IGNORECASE)


def new_path(given: str | None) -> Path:
    """Read the value of ``--out``.

    Raises:
        UsageError: the value is missing, the path exists, or its parent does not.
    """
    if not given:
        raise UsageError("--out is missing: expected a folder that does not exist yet")
    try:
        out = Path(given).expanduser()
        if out.exists() or out.is_symlink():
            raise UsageError(f"--out: {out} exists; give a folder that does not exist yet")
        if not out.absolute().parent.is_dir():
            raise UsageError(f"--out: {out.absolute().parent} does not exist")
    except (OSError, RuntimeError) as error:  # name too long, permission denied, home of an unknown user
        raise UsageError(f"--out: {given!r:.200} cannot be written: {error}") from None
    return out


def parse_size(text: str) -> int:
    """Read the value of ``--max-shard-size``; returns bytes.

    Raises:
        UsageError: the value is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise UsageError(f"--max-shard-size: expected a size such as 5GB or 500MB, found {text!r}")
    return size


def check_room(out: Path, command: str, size: int, *, is_known: bool = True) -> None:
    """Compare what will be written with the free space, before anything is read.

    Args:
        out: the folder to write.
        command: for messages.
        size: bytes that will be written, or more than that.
        is_known: whether ``size`` is what will be written; otherwise too little space is only warned of.

    Raises:
        ExpoError: there is no room.
    """
    folder = out.absolute().parent
    free = shutil.disk_usage(folder).free
    if free >= size:
        return
    found = f"{size / 1e9:.3g} GB, {free / 1e9:.3g} GB are free in {folder}"
    if is_known:
        raise ExpoError(f"{command}: {out} needs {found}; free some space, or give another --out")
    warn(f"{command}: {out} may need up to {found}")


@contextmanager
def new_folder(out: Path, command: str) -> Iterator[Path]:
    """Yield a temporary folder beside ``out``, which is renamed to ``out`` on success and removed on failure.

    Raises:
        ExpoError: the folder cannot be written to.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name[:200]}.", dir=out.absolute().parent))
    except OSError as error:
        raise ExpoError(f"{command}: {out.absolute().parent} cannot be written to: {error.strerror}") from None
    try:
        yield folder
        _open_up(folder)
        folder.rename(out)
    except OSError as error:
        raise ExpoError(
            f"{command}: {error.filename or folder}: {error.strerror}; nothing was written to {out}"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _open_up(folder: Path) -> None:
    """Set the modes that mkdir and open would give; temporary folders and copies of private files are private."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def command_progress(command: str, total: int) -> Progress:
    """Return the progress of a command: a bar on standard error if that is a terminal, else lines there.

    Args:
        command: name of the command, for example ``delta create``.
        total: bytes that the command will write or verify.
    """
    return Progress(f"expo-serve: {command}", total, on_terminal=sys.stderr.isatty())
