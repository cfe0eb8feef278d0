"""Standard input, output and error of the command: all three are open, and what cannot be written is an error."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from expo_serve.errors import ExpoError


def open_standard_streams() -> None:
    """Open what the caller has closed of standard input, output and error, for this process and its children.

    Otherwise the next file or socket would take the place of the one that is missing, and get what is written there.
    Errors go to standard output then; where that is closed too, nobody is told.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY)):
        if not _is_open(number):
            os.set_inheritable(os.open(os.devnull, flags), True)  # the lowest number that is free
    if not _is_open(2):
        os.dup2(1, 2)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - open until the end
    if sys.stderr is None:
        sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def name_failures_of_output() -> None:
    """Have writes to standard output fail with an error that says so: any other OSError could be of any file."""
    old = sys.stdout
    raw = _Output(old.fileno(), "w", closefd=False)
    buffered = isinstance(old.buffer, io.BufferedWriter)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(raw) if buffered else raw,  # as Python itself does under -u
        encoding=old.encoding,
        errors=old.errors,
        line_buffering=bool(old.line_buffering),
        write_through=not buffered,
    )


class _Output(io.FileIO):
    """Standard output, below its buffer."""

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        """Write.

        Raises:
            ExpoError: the disk is full, for example.
            BrokenPipeError: the reader is gone.
        """
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ExpoError(f"standard output cannot be written: {error.strerror}") from None


def give_up_output() -> None:
    """Drop what standard output still holds, if that cannot be written: Python's own flush at exit would fail too."""
    try:
        sys.stdout.flush()
    except (OSError, ExpoError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
