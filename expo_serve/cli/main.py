"""The command ``expo-serve``: dispatches to a subcommand, and turns every error into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

from expo_serve import errors
from expo_serve.errors import ExpoError
from expo_serve.version import __version__


class _Stopped(BaseException):
    """SIGTERM or SIGINT arrived; the argument is the signal's number."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``expo-serve``; returns the exit code (0, 1, 2 or 128 + a signal's number)."""
    started = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments), started)
    except ExpoError as error:
        errors.show(error)
        return error.exit_code
    except BrokenPipeError:
        # The reader of standard output is gone. Without this, Python's own flush at exit would fail in the same way.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _Stopped as stopped:
        sys.stderr.flush()
        # A normal exit would wait for the threads of a download.
        os._exit(128 + int(stopped.args[0]))


def _inspect(arguments: list[str]) -> int:
    from expo_serve.cli import inspect

    return inspect.main(arguments)


def _merge(arguments: list[str]) -> int:
    from expo_serve.cli import merge

    return merge.main(arguments)


def _delta(arguments: list[str]) -> int:
    from expo_serve.cli import delta

    return delta.main(arguments)


def _probe(arguments: list[str]) -> int:
    from expo_serve.cli import probe

    return probe.main(arguments)


def _sweep(arguments: list[str]) -> int:
    from expo_serve.cli import sweep

    return sweep.main(arguments, time.monotonic())


def _pairs(arguments: list[str]) -> int:
    from expo_serve.cli import pairs

    return pairs.main(arguments)


# Each imports its command only when it is called: `probe` runs every few seconds and needs next to nothing.
_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "inspect": _inspect,
    "merge": _merge,
    "delta": _delta,
    "probe": _probe,
    "pairs": _pairs,
    "sweep": _sweep,
}


def _run(arguments: list[str], started: float) -> int:
    """Run the command that the first argument names; without one it is to serve."""
    if arguments[:1] == ["--version"]:
        print(f"expo-serve {__version__}")
        return 0
    if command := _COMMANDS.get(arguments[0] if arguments else ""):
        return command(arguments[1:])
    from expo_serve.cli import serve

    return serve.main(arguments, started)


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped(number)
