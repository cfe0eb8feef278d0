"""The command: picks the subcommand, turns every error into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from types import FrameType

from expo_serve import __version__
from expo_serve.errors import ExpoError


class _Stopped(BaseException):
    """SIGTERM or SIGINT came."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``expo-serve``; returns the exit code (0, 1, 2 or 128 + a signal's number)."""
    started = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments), started)
    except ExpoError as error:
        _show(error)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our output is gone; nothing more can be said, also not by Python's own exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _Stopped as stopped:
        sys.stderr.flush()
        # Threads of a download may still run, and a normal exit would wait for them.
        os._exit(128 + int(stopped.args[0]))


def _run(arguments: list[str], started: float) -> int:
    if arguments[:1] == ["--version"]:
        print(f"expo-serve {__version__}")
        return 0
    command = arguments[0] if arguments else ""
    if command == "inspect":
        from expo_serve.cli import inspect

        return inspect.main(arguments[1:])
    if command == "merge":
        from expo_serve.cli import merge

        return merge.main(arguments[1:])
    if command == "delta":
        from expo_serve.cli import delta

        return delta.main(arguments[1:])
    if command == "probe":
        from expo_serve.cli import probe

        return probe.main(arguments[1:])
    from expo_serve.cli import serve

    return serve.main(arguments, started)


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped(number)


def _show(error: ExpoError) -> None:
    """Details first, one summary line last."""
    if os.environ.get("EXPO_DEBUG") == "1":
        traceback.print_exception(error)
    for line in error.detail_lines():
        print(f"  {line}", file=sys.stderr)
    print(f"expo-serve: error: {error.message}", file=sys.stderr, flush=True)
