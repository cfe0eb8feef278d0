"""Reads and plans a deployment as the commands do, and says whether a promise was broken.

The promise: ``prepare`` and ``inspect`` succeed, or raise an :class:`ExpoError` whose message and details are lines
without control characters and of a bounded length; in bounded time and memory; and nothing but the deployment's own
files is opened.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import expo_serve
from expo_serve.cli import inspect
from expo_serve.cli.options import read_options
from expo_serve.errors import ExpoError
from expo_serve.plan.prepare import prepare
from loadtests.fuzz.deployments import OUTSIDE, Format

MAX_CPU_SECONDS = 2.0
"""Files are of at most some 100 kB here. With a fuzzer's instrumentation everything takes about three times as long."""
MAX_GROWTH_BYTES = 512 * 2**20
MAX_LINE = 2000
"""Characters of a message or a detail; a path may take 4096 of its own, but not here."""
_HANG_SECONDS = 20
_ALLOWED = ("/proc/", "/sys/", f"{Path(expo_serve.__file__).parent}/", *(f"{folder}/" for folder in sys.path if folder))
"""Where the memory of the machine and its mounts are read, and code that is imported late."""


class _Output(io.StringIO):
    """Text that was printed, with a number for those who ask: atheris does."""

    def fileno(self) -> int:
        """Return that of standard error."""
        return 2


class _HungError(BaseException):
    pass


class Outcome(NamedTuple):
    """What became of a deployment: ``accepted``, ``refused`` or ``wrong``; ``place`` tells one cause from others."""

    kind: str
    place: str
    message: str


class Judge:
    """Judges the deployments in one folder, which becomes the working directory; once in a process.

    Args:
        folder: as :func:`loadtests.fuzz.deployments.build` wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._opened: list[str] | None = None
        os.chdir(folder)
        os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=str(folder / "hub"))
        warnings.simplefilter("ignore")
        sys.addaudithook(self._note)
        signal.signal(signal.SIGPROF, _hang)

    def __call__(self, kind: Format) -> Outcome:
        """Judge what lies there now."""
        before, started = _peak_bytes(), time.process_time()
        with self._watched() as opened:
            outcome = _judged(kind)
        seconds, growth = time.process_time() - started, _peak_bytes() - before
        if outcome.kind == "wrong":
            return outcome
        if seconds > MAX_CPU_SECONDS:
            return Outcome("wrong", f"slow at {outcome.place}", f"took {seconds:.1f} s: {outcome.message:.300}")
        if growth > MAX_GROWTH_BYTES:
            return Outcome("wrong", f"memory at {outcome.place}", f"took {growth / 2**20:.0f} MiB")
        outside = [path for path in opened if not self._is_inside(path)] if kind.stays_inside else []
        return Outcome("wrong", "opened outside", outside[0]) if outside else outcome

    @contextmanager
    def _watched(self) -> Iterator[list[str]]:
        opened: list[str] = []
        self._opened = opened
        signal.setitimer(signal.ITIMER_PROF, _HANG_SECONDS)
        try:
            yield opened
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._opened = None

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._opened is not None and event == "open" and isinstance(arguments[0], str | bytes):
            self._opened.append(os.fsdecode(arguments[0]))

    def _is_inside(self, path: str) -> bool:
        real = Path(path).resolve()
        return str(real).startswith(_ALLOWED) or (
            real.is_relative_to(self._folder) and not real.is_relative_to(self._folder / OUTSIDE)
        )


def _hang(number: int, frame: FrameType | None) -> None:
    raise _HungError


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _judged(kind: Format) -> Outcome:
    try:
        planned = _planned(kind.flags)
        inspected = _inspected(kind.flags, is_table=planned.kind == "accepted")
    except _HungError as error:
        return Outcome("wrong", f"hung at {place_of(error)}", f"no end after {_HANG_SECONDS} s")
    except RecursionError as error:  # one place of a loop of calls is as good as another
        return Outcome("wrong", f"RecursionError at {place_of(error, first=True)}", f"{error!s:.300}")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - of whatever kind: it is the find
        return Outcome("wrong", f"{type(error).__name__} at {place_of(error)}", f"{error!s:.300}")
    if "wrong" in (planned.kind, inspected.kind):
        return planned if planned.kind == "wrong" else inspected
    if planned.kind != inspected.kind:
        message = f"prepare: {planned.message:.200}; inspect: {inspected.message:.200}"
        return Outcome("wrong", f"inspect says {inspected.kind}, prepare {planned.kind}", message)
    return planned


def _planned(flags: Sequence[str]) -> Outcome:
    try:
        with redirect_stderr(_Output()):
            options = read_options(inspect.parser(), list(flags))
            plan = prepare(options.config, options.hub)
    except ExpoError as error:
        return _checked("refused", place_of(error), [error.message, *error.details])
    return _checked("accepted", "plan", list(plan.warnings))


def _inspected(flags: Sequence[str], *, is_table: bool) -> Outcome:
    output, errors = _Output(), _Output()
    arguments = [*flags, *([] if is_table else ["--json"])]
    try:
        with redirect_stdout(output), redirect_stderr(errors):
            code = inspect.main(arguments)
    except ExpoError as error:
        return _checked("refused", place_of(error), [error.message, *error.details])
    kind = "refused" if code else "accepted"
    if is_table:
        lines = [line for line in output.getvalue().split("\n") if not line.isspace()]
        return _checked(kind, "inspect's tables", lines)
    found = json.loads(output.getvalue())
    refusals = [line for refusal in found["refusals"] for line in (refusal["message"], *refusal["details"])]
    return _checked(kind, "inspect", [*refusals, *found["warnings"]])


def _checked(kind: str, place: str, lines: Sequence[str]) -> Outcome:
    """Return the outcome, or that a line of it is none."""
    for line in lines:
        if any(not character.isprintable() for character in line):
            return Outcome("wrong", f"control characters at {place}", f"{line!r:.300}")
        if len(line) > MAX_LINE:
            return Outcome("wrong", f"line too long at {place}", f"{len(line)} characters: {line:.200}")
    return Outcome(kind, place, lines[0] if lines else "")


def place_of(error: BaseException, *, first: bool = False) -> str:
    """Return file and line of the package that an exception comes from: the last ones, or the first ones."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "/expo_serve/" in frame.filename
    ] or traceback.extract_tb(error.__traceback__)
    frame = frames[0 if first else -1]
    return f"{frame.filename.rpartition('/expo_serve/')[2]}:{frame.lineno} {frame.name}"
