"""The exceptions that expo-serve raises on purpose, and how an error and a warning are printed.

::

    ExpoError                  exit 1   base of all of them
    ├── UsageError             exit 2   the command line: a flag, its value, a refused environment variable
    │   └── ConfigError        exit 2   the configuration: --config file, model_loader_extra_config
    ├── SourceError            exit 2   a source cannot be found: path, hub id, revision
    ├── CheckpointError        exit 2   a file breaks what the safetensors format or its index promises
    ├── PairError              exit 2   the two checkpoints cannot be combined
    ├── ValuesError            exit 1   a weight is not finite, or not the expected one
    ├── LoadError              exit 1   the model and the checkpoint did not match while loading
    ├── ServeError             exit 1   the server, an engine or a worker ended
    │   └── AddressError       exit 1   a port or socket cannot be listened on
    └── CompatError            exit 1   the installed vLLM lacks a name that expo-serve depends on

A message is one line: what, where, expected, found, what to do. Longer lists are ``details``.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

MAX_DETAILS = 10
ERROR_PREFIX = "expo-serve: error: "
"""Begins the summary line of every error; the keeper recognises a line that is already printed by it."""
_WARNING_PREFIX = "expo-serve: warning: "
_READER_SECONDS = 2.0
"""After which a reader of standard error counts as stalled; nothing waits for it longer."""
_RETRY_SECONDS = 0.05
_THREAD = "expo-serve-stderr"


def count_of(number: int, one: str, many: str = "") -> str:
    """Return a number and its noun, for messages: ``1 tensor is``, ``2 tensors are``.

    Args:
        number: how many.
        one: what follows the number 1.
        many: what follows any other number; by default ``one`` with an ``s``.
    """
    return f"{number} {one if number == 1 else many or one + 's'}"


REASONS = (
    "usage", "source", "checkpoint", "pair", "values", "load", "compat", "address", "out_of_memory", "died", "hung",
    "serve", "error",
)  # fmt: skip
"""Kinds of failures, as the status port and its metrics name them."""


class ExpoError(Exception):
    """Base class of all errors of expo-serve.

    Args:
        message: one line that says what is wrong and what to do.
        details: lines printed before the message; at most ten are shown, the rest is counted.
    """

    exit_code = 1
    reason = "error"
    """One of :data:`REASONS`."""

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message, tuple(details))
        self.message = message
        self.details = tuple(details)

    def detail_lines(self) -> list[str]:
        """Return the details to print: at most ten, then a line that counts the rest."""
        shown = list(self.details[:MAX_DETAILS])
        hidden = len(self.details) - len(shown)
        return [*shown, f"... and {hidden} more"] if hidden else shown

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"  {line}" for line in self.detail_lines())])


class UsageError(ExpoError):
    """The command line is wrong."""

    exit_code = 2
    reason = "usage"


class ConfigError(UsageError):
    """A configuration file or the loader's extra config is wrong."""


class SourceError(ExpoError):
    """A source (folder or hub id) cannot be found or read."""

    exit_code = 2
    reason = "source"


class CheckpointError(ExpoError):
    """A file of a checkpoint breaks what the safetensors format or the index promises."""

    exit_code = 2
    reason = "checkpoint"


class PairError(ExpoError):
    """The two checkpoints cannot be extrapolated."""

    exit_code = 2
    reason = "pair"


class ValuesError(ExpoError):
    """A weight or a result is NaN or infinite, or a weight is not the one that a delta expects."""

    reason = "values"


class LoadError(ExpoError):
    """The model did not take its parameters from the checkpoint."""

    reason = "load"


class ServeError(ExpoError):
    """The server, one of its engines or one of its workers ended."""

    reason = "serve"


class AddressError(ServeError):
    """A port or socket cannot be listened on."""

    reason = "address"


class CompatError(ExpoError):
    """The installed vLLM lacks a name that expo-serve depends on."""

    reason = "compat"


def reason_of(error: BaseException) -> str:
    """Return the kind of a failure, one of :data:`REASONS`."""
    if isinstance(error, ExpoError):
        return error.reason
    return "out_of_memory" if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ else "error"


def line_of(error: BaseException) -> str:
    """Return an exception in one line; one that is not expo-serve's with its class."""
    if isinstance(error, ExpoError):
        return error.message
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def show(error: ExpoError) -> None:
    """Print an error on standard error: details first, one summary line last.

    The traceback comes before both when the environment variable ``EXPO_DEBUG`` is 1. Where nobody reads standard
    error, it is given up after two seconds.
    """
    trace = traceback.format_exception(error) if os.environ.get("EXPO_DEBUG") == "1" else []
    details = [f"  {line}\n" for line in error.detail_lines()]
    _print("".join([*trace, *details, f"{ERROR_PREFIX}{error.message}\n"]), _READER_SECONDS)


def warn(message: str) -> None:
    """Print one warning line on standard error; for a reader that stalls it waits once, for two seconds."""
    has_stalled = any(thread.name == _THREAD for thread in threading.enumerate())
    _print(f"{warning_line(message)}\n", 0.0 if has_stalled else _READER_SECONDS)


def warning_line(message: str) -> str:
    """Return the line that a warning is printed as, without its end."""
    return f"{_WARNING_PREFIX}{message}"


def _print(text: str, seconds: float) -> None:
    """Print on standard error; a thread does, and goes on in the background when the time is over."""
    stream = sys.stderr
    write = _write if stream is not None and stream is sys.__stderr__ else _write_to
    thread = threading.Thread(target=write, args=(stream, text), name=_THREAD, daemon=True)
    thread.start()
    thread.join(seconds)


def _write(stream: TextIO, text: str) -> None:
    """Write past the buffer of ``sys.stderr``: a thread that stalls in it would hold a lock that the exit takes."""
    data = text.encode(stream.encoding, "backslashreplace")
    with (
        suppress(OSError, ValueError),
        io.FileIO(stream.fileno(), "w", closefd=False) as file,
    ):  # its reader may be gone
        while data:
            written = file.write(data)
            if written is None:  # somebody has set O_NONBLOCK, and there is no room
                time.sleep(_RETRY_SECONDS)
            data = data[written or 0 :]


def _write_to(stream: TextIO | None, text: str) -> None:
    """Write to what a program that calls us has put in the place of ``sys.stderr``; None is standard output."""
    with suppress(OSError, ValueError):
        print(text, end="", file=stream, flush=True)
