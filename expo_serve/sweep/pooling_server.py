"""The server of a reward model: a process of vLLM's with its pooling runner, which nobody else can reach.

It listens on a Unix socket in a folder that only this user may enter, since vLLM asks for no API key on the routes of
its pooling runner. A keeper of its own (``expo_serve.cli.keeper``) watches its processes and ends all of them,
also where this process is killed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType

import httpx

from expo_serve.errors import ServeError, UsageError

_SERVER = "expo_serve.vllm_plugin.pooling"
_HOST = "reward-model"
"""Of the URLs only; the requests go to the socket."""
_READY_SECONDS = 1800.0
_ANSWER_SECONDS = 600.0
_HEALTH_SECONDS = 5.0
_POLL_SECONDS = 0.3
_STOP_SECONDS = 30.0
_LOG_BYTES = 1 << 20
"""Of the end of the log, in which the cause of a failure is looked for."""
_ERROR = re.compile(r"expo-serve[\w ]*: error: (.*)")
"""The keeper's line, or one of vLLM's parser about a flag."""
_INVALID = re.compile(r"[\w.]*ValidationError: \d+ validation errors? for")
_REASON = re.compile(r"^(?:\(\w+ pid=\d+\))? +(?:Value error|Assertion failed), (.*?)(?: \[type=.*)?$", re.MULTILINE)
"""What pydantic writes below that, which says more."""


class PoolingServer:
    """A running reward model: entering the context starts it, leaving ends all of its processes.

    Args:
        model: folder or hub id.
        arguments: flags of vLLM's; they win over those set here.
        log: file that the processes' output is appended to.
        ready_seconds: how long it may take to start.
    """

    def __init__(
        self, model: str, arguments: Sequence[str], log: Path, *, ready_seconds: float = _READY_SECONDS
    ) -> None:
        self._model, self._arguments, self._log = model, tuple(arguments), log
        self._ready_seconds = ready_seconds

    def __enter__(self) -> PoolingServer:
        """Start the processes and wait until the model answers.

        Raises:
            ServeError: they ended, or did not answer in time; says why in one line.
            UsageError: vLLM refused a flag.
        """
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="expo-reward-"))
            self._socket = str(Path(folder, "socket"))
            self._start()
            stack.callback(self._end)
            self._wait_ready()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def connect(self) -> httpx.AsyncClient:
        """Return a client of the server, for paths like ``/classify``."""
        transport = httpx.AsyncHTTPTransport(uds=self._socket)
        return httpx.AsyncClient(transport=transport, base_url=f"http://{_HOST}", timeout=_ANSWER_SECONDS)

    def is_well(self) -> bool:
        """Return whether the server and its engine live."""
        # Not by httpx, which leaves the socket of a connection that is refused open.
        with suppress(OSError, HTTPException), socket.socket(socket.AF_UNIX) as connected:
            connected.settimeout(_HEALTH_SECONDS)
            connected.connect(self._socket)
            connection = HTTPConnection(_HOST)
            connection.sock = connected
            connection.request("GET", "/health")
            return connection.getresponse().status == HTTPStatus.OK
        return False

    def failure(self, what: str) -> ServeError:
        """Return the error of a server that is gone, or about to go.

        Args:
            what: what it did, for example ``did not start``.
        """
        with suppress(subprocess.TimeoutExpired):
            self._keeper.wait(_STOP_SECONDS)
        code = self._keeper.poll()
        cause = self._cause() or ("it still runs" if code is None else f"code {code}")
        return ServeError(f"the reward model {self._model} {what}: {cause} (its log: {self._log})")

    def _start(self) -> None:
        # Compiling would take longer than it saves for some thousand answers.
        ours = ["--uds", self._socket, "--max-model-len", "auto", "--enforce-eager", "--disable-uvicorn-access-log"]
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            self._keeper = subprocess.Popen(
                [sys.executable, "-m", "expo_serve.cli.keeper"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C at a terminal reaches only this process
                env={**os.environ, "PYTHONSAFEPATH": "1"},  # a folder named like the package must not shadow it
            )
        assert self._keeper.stdin is not None
        with suppress(BrokenPipeError):
            request = {"module": _SERVER, "arguments": [self._model, *ours, *self._arguments]}
            self._keeper.stdin.write(json.dumps(request).encode() + b"\n")
            self._keeper.stdin.flush()  # left open: its end tells the keeper that this process is gone

    def _wait_ready(self) -> None:
        give_up = time.monotonic() + self._ready_seconds
        while not self.is_well():
            if self._keeper.poll() == UsageError.exit_code:
                raise UsageError(f"the reward model {self._model}: {self._cause()}")
            if self._keeper.poll() is not None:
                raise self.failure("did not start")
            if time.monotonic() > give_up:
                raise ServeError(
                    f"the reward model {self._model} did not answer within {self._ready_seconds:.0f} s (its log: "
                    f"{self._log})"
                )
            time.sleep(_POLL_SECONDS)

    def _end(self) -> None:
        """End the server as SIGTERM would, and wait; the end of the keeper's input kills what is left."""
        assert self._keeper.stdin is not None
        with suppress(OSError):
            os.write(self._keeper.stdin.fileno(), bytes([signal.SIGTERM]))
        with suppress(subprocess.TimeoutExpired):
            self._keeper.wait(_STOP_SECONDS)
        with suppress(OSError):
            self._keeper.stdin.close()
        self._keeper.wait()

    def _cause(self) -> str | None:
        """Return why the server ended, by the end of its log."""
        with self._log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - _LOG_BYTES))
            log = file.read().decode(errors="replace")
        found = [match[1] for line in log.splitlines() if (match := _ERROR.match(line))]
        if found and _INVALID.match(found[-1]) and (reasons := _REASON.findall(log)):
            return str(reasons[-1])
        return found[-1] if found else None
