"""The engine under test: one server of vLLM's, started once, into which the sweep loads one alpha after another.

The process is the command's own server (``expo_serve.cli.keeper`` starts and watches it); what it has more is a socket
over which the sweep names the next alpha (``expo_serve.vllm_plugin.sweeping``). It listens on the loopback interface,
with a key that is made for it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from expo_serve.config import ExpoConfig, format_alpha
from expo_serve.errors import ExpoError, LoadError, ServeError, UsageError
from expo_serve.report import DeploymentReport
from expo_serve.sweep.endpoint import Endpoint

_HOST = "127.0.0.1"
_POLL_SECONDS = 0.3
_STOP_SECONDS = 30.0
_ERROR = re.compile(r"expo-serve(?: serve)?: error: (.*)")


@dataclass
class Engine:
    """The engine; entering the context starts it with ``config.alpha``, leaving ends all of its processes.

    Args:
        config: pinned; its alpha is the first.
        arguments: flags of vLLM, as on the command line.
        file_options: keys of the ``--config`` file that are vLLM's.
        log: file for vLLM's log.
    """

    config: ExpoConfig
    arguments: Sequence[str]
    file_options: dict[str, Any]
    log: Path
    start_seconds: float = 0.0
    """How long it took to start."""
    loads: int = 0
    """How many alphas it has loaded in place."""

    def __enter__(self) -> Engine:
        started = time.monotonic()
        self._key = secrets.token_urlsafe(24)
        self._port = _free_port()
        ours, theirs = socket.socketpair()
        self._channel, self._lines = ours, ours.makefile("rb")
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._keeper = subprocess.Popen(
                [sys.executable, "-m", "expo_serve.cli.keeper"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C at a terminal reaches only this process
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONSAFEPATH": "1", "VLLM_API_KEY": self._key},
            )
        try:
            request = self._request(theirs.fileno())
            theirs.close()
            assert self._keeper.stdin is not None
            self._keeper.stdin.write(json.dumps(request).encode() + b"\n")
            self._keeper.stdin.flush()
            self._wait_ready()
        except BaseException:
            self._end()
            raise
        self.start_seconds = time.monotonic() - started
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._end()

    def _request(self, descriptor: int) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "arguments": [*self.arguments, "--host", _HOST, "--port", str(self._port)],
            "file_options": self.file_options,
            "served_model_name": self.model,
            "sweep_fd": descriptor,
        }

    @property
    def model(self) -> str:
        """The served name, the same at every alpha."""
        assert self.config.pinned is not None
        return f"{self.config.pinned.named_after.short_name}-expo"

    @property
    def endpoint(self) -> Endpoint:
        """The engine's address, pinned to the alpha that it serves now."""
        pinned = self.config.pinned
        assert pinned is not None
        return Endpoint(
            url=f"http://{_HOST}:{self._port}/v1",
            model=self.model,
            key=self._key,
            alpha=format_alpha(self.config.alpha),
            tokenizer=pinned.tokenizer or pinned.deployed.path,
        )

    def load(self, alpha: float) -> float:
        """Load the weights of another alpha in place; returns the seconds that it took.

        Raises:
            LoadError: they could not be loaded; the engine is of no use any more.
            ServeError: the engine is gone.
        """
        started = time.monotonic()
        try:
            self._channel.sendall(json.dumps({"alpha": alpha}).encode() + b"\n")
            line = self._lines.readline()
        except OSError:
            line = b""
        if not line:
            raise self.failure()
        answer = json.loads(line)
        if "error" in answer:
            raise LoadError(f"alpha {format_alpha(alpha)} could not be loaded in place: {answer['error']}")
        self.config = self.config.model_copy(update={"alpha": alpha})
        self.loads += 1
        return time.monotonic() - started

    def report(self) -> DeploymentReport:
        """Return what the server says of the weights that it serves.

        Raises:
            ServeError: it does not answer.
        """
        try:
            return DeploymentReport.model_validate_json(self._get("expo").text)
        except httpx.HTTPError as error:
            raise self.failure(str(error)) from None

    def max_length(self) -> int:
        """Return the most tokens that a prompt and its answer may have together.

        Raises:
            ServeError: the server does not answer.
        """
        try:
            return int(self._get("models").json()["data"][0]["max_model_len"])
        except httpx.HTTPError as error:
            raise self.failure(str(error)) from None

    def _get(self, route: str) -> httpx.Response:
        endpoint = self.endpoint
        answer = httpx.get(f"{endpoint.url}/{route}", headers=endpoint.headers, timeout=60, trust_env=False)
        return answer.raise_for_status()

    def failure(self, otherwise: str = "it ended") -> ServeError:
        """Return why the engine is gone: the last error in its log, which the keeper writes."""
        with suppress(subprocess.TimeoutExpired):
            self._keeper.wait(_STOP_SECONDS)
        cause = self._last_error() or otherwise
        return ServeError(f"the engine failed: {cause} (its log: {self.log})")

    def _last_error(self) -> str | None:
        """Return the last error line in the log: the keeper's, or vLLM's own parser's about a flag."""
        lines = self.log.read_bytes()[self._log_start :].decode(errors="replace").splitlines()
        errors = [found[1] for line in lines if (found := _ERROR.match(line))]
        return errors[-1] if errors else None

    def _wait_ready(self) -> None:
        """Wait until the server answers; it ends by itself, with a reason, when it cannot."""
        url = f"http://{_HOST}:{self._port}/health"
        while True:
            if self._keeper.poll() is not None:
                raise self._not_started()
            with suppress(httpx.HTTPError):
                if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                    return
            time.sleep(_POLL_SECONDS)

    def _not_started(self) -> ExpoError:
        cause = self._last_error() or f"code {self._keeper.returncode}"
        if self._keeper.returncode == UsageError.exit_code:
            return UsageError(cause)
        return ServeError(f"the engine did not start: {cause} (its log: {self.log})")

    def _end(self) -> None:
        """End the server as SIGTERM would, and wait; the end of the keeper's input kills what is left."""
        assert self._keeper.stdin is not None
        with suppress(OSError):
            os.write(self._keeper.stdin.fileno(), bytes([signal.SIGTERM]))
        with suppress(subprocess.TimeoutExpired):
            self._keeper.wait(_STOP_SECONDS)
        with suppress(OSError):
            self._keeper.stdin.close()
        self._lines.close()
        self._channel.close()
        self._keeper.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((_HOST, 0))
        port: int = listener.getsockname()[1]
        return port
