"""The command ``expo-serve``: dispatches to a subcommand, and turns every error into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

from expo_serve import errors
from expo_serve.cli.standard_streams import give_up_output, name_failures_of_output, open_standard_streams
from expo_serve.errors import ExpoError
from expo_serve.version import __version__


class _Stopped(BaseException):
    """A signal that ends the command arrived; the argument is its number."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``expo-serve``; returns the exit code (0, 1, 2 or 128 + a signal's number)."""
    if arguments is None:
        _leave_ascii()
    started = time.monotonic()
    open_standard_streams()
    if arguments is None:
        name_failures_of_output()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP:  # ignored under nohup
            signal.signal(number, _stop)
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments), started)
        sys.stdout.flush()
        return code
    except ExpoError as error:
        errors.show(error)
        give_up_output()
        return error.exit_code
    except BrokenPipeError:  # the reader of standard output is gone
        give_up_output()
        return 1
    except _Stopped as stopped:
        sys.stderr.flush()
        # A normal exit would wait for the threads of a download.
        os._exit(128 + int(stopped.args[0]))


def _leave_ascii() -> None:
    """Begin anew in Python's UTF-8 mode where the locale would make it ASCII.

    torch reads files of its own in the locale's encoding, and names of files come as bytes that JSON cannot hold. By
    itself Python does this in the C locale, unless it is told not to.
    """
    if sys.getfilesystemencoding() == "ascii":
        os.environ["PYTHONUTF8"] = "1"  # for the children
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


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
    """Run the command that the first argument names; without one it is to serve. Returns the exit code."""
    if arguments[:1] == ["--version"]:
        print(f"expo-serve {__version__}")
        return 0
    try:
        if command := _COMMANDS.get(arguments[0] if arguments else ""):
            return command(arguments[1:])
        from expo_serve.cli import serve

        return serve.main(arguments, started)
    except SystemExit as end:  # argparse has printed the help
        return int(end.code or 0)


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped(number)
