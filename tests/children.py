"""Modules of these tests that run as a process of their own: asked and answered in JSON, by one line each way."""

from __future__ import annotations

import json
import subprocess
import sys
from tempfile import TemporaryFile
from typing import Any

from tests.server import ENGINE_ENV

_MARK = "answer: "


class Child:
    """``python -m module`` with a request; ``environment`` has further variables."""

    def __init__(self, module: str, request: Any, **environment: str) -> None:
        # A pipe that nobody empties would stop it.
        self._output = TemporaryFile("w+")  # noqa: SIM115 - open until the end
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(request)],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**ENGINE_ENV, **environment},
        )

    def answer(self, timeout: float = 280) -> Any:
        """What it replied.

        Raises:
            AssertionError: it failed; the end of its output is in the message.
        """
        code = self._process.wait(timeout)
        self._output.seek(0)
        output = self._output.read()
        assert code == 0, output[-8000:]
        line = next(line for line in output.splitlines() if line.startswith(_MARK))
        return json.loads(line.removeprefix(_MARK))

    def end(self) -> None:
        """Kill it, if it is still there."""
        self._process.kill()
        self._process.wait()
        self._output.close()


def ask(module: str, request: Any, **environment: str) -> Any:
    """Run a module to its end and give its reply."""
    child = Child(module, request, **environment)
    try:
        return child.answer()
    finally:
        child.end()


def asked() -> Any:
    """In the child: the request."""
    return json.loads(sys.argv[1])


def reply(answer: Any) -> None:
    """In the child: the answer, on a line of its own among what libraries print."""
    print(f"\n{_MARK}{json.dumps(answer)}", flush=True)
