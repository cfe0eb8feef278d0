"""What a refusal by the real command looks like."""

from __future__ import annotations

import subprocess

from tests.server import run_command

_SUMMARY = "expo-serve: error: "
_MOST_LINES = 12
"""Ten details, a line that counts the rest, the summary."""


def refused(*arguments: str, words: tuple[str, ...], code: int = 2, **environment: str) -> str:
    """Run the command, check that it refuses in our form, and return what it printed on stderr."""
    result = run_command(*arguments, timeout=30, **environment)
    assert_refusal(result, words, code)
    return result.stderr


def assert_refusal(result: subprocess.CompletedProcess[str], words: tuple[str, ...], code: int = 2) -> None:
    """The exit code, one summary line, last; no traceback; every word is there."""
    lines = result.stderr.splitlines()
    assert result.returncode == code, result.stderr
    assert [line for line in lines if line.startswith(_SUMMARY)] == lines[-1:], result.stderr
    assert len(lines) <= _MOST_LINES, result.stderr
    assert "Traceback" not in result.stderr
    missing = [word for word in words if word not in result.stderr]
    assert not missing, f"{missing} not in: {result.stderr}"
