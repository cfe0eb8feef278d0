"""The real command as a child process, for the tests that need a running server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

EXPO_SERVE = [str(Path(sys.executable).with_name("expo-serve"))]
# As it was when the tests began: importing vLLM into this process changes it.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("EXPO_", "VLLM_"))}
ENGINE_ENV = {
    **_ENVIRONMENT,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
_START_SECONDS = 240.0


def free_port() -> int:
    """A TCP port that nobody listens on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def run_command(*arguments: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``expo-serve`` to its end; standard output and error are captured."""
    return run_in(Path.cwd(), *arguments, timeout=timeout, **environment)


def run_in(folder: Path, *arguments: str, timeout: float, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``expo-serve`` in a folder to its end; standard output and error are captured."""
    return subprocess.run(
        [*EXPO_SERVE, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=folder,
        env={**ENGINE_ENV, **environment},
    )


class Server:
    """A server process: ``expo-serve`` unless another command is given. Its output goes to ``log``."""

    def __init__(
        self, arguments: list[str], log: Path, *, command: list[str] | None = None, **environment: str
    ) -> None:
        self.port = free_port()
        self.log = log
        self.api_key: str | None = None
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*(command or EXPO_SERVE), *arguments, "--port", str(self.port), "--host", "127.0.0.1"],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**ENGINE_ENV, **environment},
            )

    @property
    def url(self) -> str:
        """The server's root."""
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, **headers: str) -> httpx.Response:
        """GET with the API key, when there is one."""
        return httpx.get(f"{self.url}{path}", headers={**self._authorization(), **headers}, timeout=30)

    def post(self, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        """POST a JSON body with the API key, when there is one."""
        return self.request("POST", path, body, **headers)

    def request(self, method: str, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        """Send a JSON body by some method with the API key, when there is one."""
        given = {**self._authorization(), **headers}
        return httpx.request(method, f"{self.url}{path}", json=body, headers=given, timeout=120)

    def _authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def wait_ready(self, timeout: float = _START_SECONDS) -> Server:
        """Wait until /health answers 200."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"server ended with {self.process.returncode}:\n{self.tail()}")
            try:
                if self.get("/health").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.3)
        raise AssertionError(f"server not ready after {timeout} s:\n{self.tail()}")

    def wait_for_line(self, text: str, timeout: float = _START_SECONDS) -> None:
        """Wait until the log holds ``text``."""
        deadline = time.monotonic() + timeout
        while text not in self.text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{text!r} never came:\n{self.tail()}")
            time.sleep(0.1)

    def text(self) -> str:
        """All that was printed."""
        return self.log.read_text(errors="replace")

    def tail(self, lines: int = 40) -> str:
        """The last lines that were printed."""
        return "\n".join(self.text().splitlines()[-lines:])

    def family(self) -> list[psutil.Process]:
        """The command's process and all its descendants."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def stop(self, number: int = signal.SIGTERM, timeout: float = 30) -> int:
        """Send a signal and wait for the end; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"server still there {timeout} s after signal {number}:\n{self.tail()}") from None
