"""Runs cases, each in a process of its own with a limit of time. Imports no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from loadtests.device_check.cases import Case
from loadtests.device_check.outcome import Outcome, last_outcome

_LAST_LINES = 6


def run_case(case: Case, device: str, quick: bool, work: Path) -> Outcome:
    """The outcome of a case; whatever becomes of its process."""
    command = [sys.executable, "-m", "loadtests.device_check.case", case.name, "--device", device, "--work", str(work)]
    return outcome_of(case.name, command + ["--quick"] * quick, case.seconds)


def outcome_of(name: str, command: list[str], limit: float) -> Outcome:
    """Run a command that ends with an outcome.

    Args:
        name: of the case.
        command: to run.
        limit: in seconds; then it and all that it started is ended.
    """
    started = time.perf_counter()
    # In a group of its own: an engine's or a rank's processes end with it.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    try:
        output, said = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        _end(process)
        output, said = process.communicate()
        reason = f"ended after {limit:.0f} s{_tail(said or output)}"
        return Outcome(name, "timed out", reason, seconds=round(time.perf_counter() - started, 3))
    except BaseException:
        _end(process)
        raise
    if found := last_outcome(output):
        return found
    reason = f"exit code {process.returncode} without an answer{_tail(said or output)}"
    return Outcome(name, "crashed", reason, seconds=round(time.perf_counter() - started, 3))


def _end(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _tail(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f": {' | '.join(lines[-_LAST_LINES:])}" if lines else ""
