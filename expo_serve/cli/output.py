"""What the commands that write a folder share: a name that appears when all is there, and how far it is."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from expo_serve.errors import ExpoError, UsageError

Advance = Callable[[int], None]
"""Told of bytes that are done."""

LINE_SECONDS = 10.0
"""Between the lines that say how far it is, where there is no terminal."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]B)?", re.IGNORECASE)
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.index.json")


def new_path(given: str | None) -> Path:
    """Read ``--out``.

    Raises:
        UsageError: it is missing, is there already, or its parent is not.
    """
    if not given:
        raise UsageError("--out is missing: expected a folder that does not exist yet")
    try:
        out = Path(given).expanduser()
        if out.exists() or out.is_symlink():
            raise UsageError(f"--out: {out} exists; give a folder that does not exist yet")
        if not out.absolute().parent.is_dir():
            raise UsageError(f"--out: {out.absolute().parent} does not exist")
    except (OSError, RuntimeError) as error:  # a name too long, no right to look, the home of nobody
        raise UsageError(f"--out: {given!r:.200} cannot be written: {error}") from None
    return out


def parse_size(text: str) -> int:
    """Read ``--max-shard-size``, in bytes.

    Raises:
        UsageError: it is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise UsageError(f"--max-shard-size: expected a size such as 5GB or 500MB, found {text!r}")
    return size


@contextmanager
def new_folder(out: Path, command: str) -> Iterator[Path]:
    """A folder under a temporary name beside ``out``, renamed to it when all went well, else removed.

    Raises:
        ExpoError: it cannot be written to.
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
    """The modes that plain mkdir and open give; temporary folders and copies of private files are private."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)
    folder.chmod(0o777 & ~umask)


def copy_side_files(source: Path, folder: Path, leave_out: Collection[str] = ()) -> None:
    """Config, tokenizer, chat template: every small file beside the weights, but those to leave out."""
    for file in sorted(source.iterdir()):
        is_hidden = file.name.startswith(".") or file.name in leave_out
        if file.is_file() and not is_hidden and not any(file.match(glob) for glob in _WEIGHTS):
            shutil.copyfile(file, folder / file.name)


@contextmanager
def progress(command: str, total: int) -> Iterator[Advance]:
    """A bar with bytes, rate and time left on standard error when that is a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        yield Lines(command, total).advance
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(command, total=total)
        yield lambda size: bar.advance(task, size)


class Lines:
    """Says how far it is on standard error, every ten seconds.

    Args:
        command: what is under way.
        total: bytes in all.
    """

    def __init__(self, command: str, total: int) -> None:
        self._command, self._total = command, total
        self._started = time.monotonic()
        self._next = self._started + LINE_SECONDS
        self._done = 0

    def advance(self, size: int) -> None:
        """So many bytes more are done."""
        self._done += size
        now = time.monotonic()
        if now < self._next or not self._done:
            return
        self._next = now + LINE_SECONDS
        seconds = now - self._started
        left = seconds * (self._total / self._done - 1)
        print(
            f"expo-serve: {self._command}: {self._done / max(1, self._total):.0%}, {self._done / 1e9:.1f} of "
            f"{self._total / 1e9:.1f} GB after {seconds:.0f} s, about {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
