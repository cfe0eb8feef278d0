"""Every error that expo-serve raises on purpose.

::

    ExpoError                  exit 1   anything below
    ├── UsageError             exit 2   the call: a flag, its value, a refused environment variable
    │   └── ConfigError        exit 2   the configuration: --config file, model_loader_extra_config
    ├── SourceError            exit 2   a source cannot be found: path, hub id, revision
    ├── CheckpointError        exit 2   a file is not what safetensors or its index promise
    ├── PairError              exit 2   the two checkpoints do not make a pair
    ├── ValuesError            exit 1   a weight is not finite
    ├── LoadError              exit 1   the model and the checkpoint did not fit together while loading
    ├── ServeError             exit 1   the server, an engine or a worker ended
    └── CompatError            exit 1   the installed vLLM lacks a name that we build on

A message is one line: what, where, expected, found, what to do. Longer lists are ``details``.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_DETAILS = 10


class ExpoError(Exception):
    """Base of all errors of expo-serve.

    Args:
        message: one line that says what is wrong and what to do.
        details: lines shown before it, at most ten of them; the rest is counted.
    """

    exit_code = 1

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message, tuple(details))
        self.message = message
        self.details = tuple(details)

    def detail_lines(self) -> list[str]:
        """The details to show: at most ten, then a line that counts the rest."""
        shown = list(self.details[:MAX_DETAILS])
        hidden = len(self.details) - len(shown)
        return [*shown, f"... and {hidden} more"] if hidden else shown

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"  {line}" for line in self.detail_lines())])


class UsageError(ExpoError):
    """The call itself is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file or the loader's extra config is wrong."""


class SourceError(ExpoError):
    """A source (folder or hub id) cannot be found or read."""

    exit_code = 2


class CheckpointError(ExpoError):
    """A checkpoint's files are not what the safetensors format or the index promise."""

    exit_code = 2


class PairError(ExpoError):
    """The two checkpoints cannot be extrapolated."""

    exit_code = 2


class ValuesError(ExpoError):
    """A weight, or the result of extrapolating it, is NaN or infinite."""


class LoadError(ExpoError):
    """The model did not take its parameters from the checkpoint."""


class ServeError(ExpoError):
    """The server, one of its engines or one of its workers ended."""


class CompatError(ExpoError):
    """The installed vLLM lacks a name that expo-serve builds on."""
