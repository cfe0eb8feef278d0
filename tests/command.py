"""What a refusal by the command looks like: by its ``main`` in this process, or by the real command."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from unittest import mock

from expo_serve.cli.main import main
from tests.server import run_command

_SUMMARY = "expo-serve: error: "
_MOST_LINES = 12
"""Ten details, a line that counts the rest, the summary."""


def run_here(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call ``main``: a tenth of a second instead of half a one. It must end before vLLM would be started.

    Variables that libraries read when they are imported, such as ``HF_HOME``, want the real command.
    """
    output, errors = StringIO(), StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(subprocess, "Popen", side_effect=AssertionError("nothing was refused: vLLM is started")),
        redirect_stdout(output),
        redirect_stderr(errors),
    ):
        try:
            code = main(arguments)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def refused(*arguments: str, words: tuple[str, ...], code: int = 2, **environment: str) -> str:
    """Call the command's ``main``, check that it refuses in our form, and return what it printed on stderr."""
    result = run_here(*arguments, **environment)
    assert_refusal(result, words, code)
    return result.stderr


def refused_by_command(*arguments: str, words: tuple[str, ...], code: int = 2, **environment: str) -> str:
    """The same by the real command."""
    result = run_command(*arguments, timeout=60, **environment)
    assert_refusal(result, words, code)
    return result.stderr


def assert_refused_alike(*arguments: str, words: tuple[str, ...], code: int = 2, **environment: str) -> None:
    """The real command refuses, and word for word as its ``main`` does in this process."""
    printed = refused_by_command(*arguments, words=words, code=code, **environment)
    assert printed == refused(*arguments, words=words, code=code, **environment)


def assert_refusal(result: subprocess.CompletedProcess[str], words: tuple[str, ...], code: int = 2) -> None:
    """The exit code, one summary line, last; no traceback; every word is there."""
    lines = result.stderr.splitlines()
    assert result.returncode == code, result.stderr
    assert [line for line in lines if line.startswith(_SUMMARY)] == lines[-1:], result.stderr
    assert len(lines) <= _MOST_LINES, result.stderr
    assert "Traceback" not in result.stderr
    missing = [word for word in words if word not in result.stderr]
    assert not missing, f"{missing} not in: {result.stderr}"
