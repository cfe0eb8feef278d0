"""A real server whose log nobody reads: it answers, and ends when it is told to, as if somebody did."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread

import httpx
import psutil
import pytest

from tests.cli.pipes import NOTICE, PIPE_BYTES, fill, new_pipe
from tests.server import ENGINE_ENV, EXPO_SERVE, free_port
from tests.vllm_plugin.trees import assert_all_gone, assert_nothing_new, shared_memory

pytestmark = [pytest.mark.engine, pytest.mark.slow]
START_SECONDS = 240.0
ENGINE_DEATH_SECONDS = 40.0
LINES, LINE_BYTES = 200, 60_000
"""Of the access log: together more than all that is held on the way."""


class Stalling:
    """The real command with a tiny pair; its output goes into a pipe that is read until :meth:`stall`."""

    def __init__(self, pair: tuple[Path, Path], pipe: tuple[int, int]) -> None:
        self.port = free_port()
        self._pipe = pipe
        self._is_read = True
        self.output = bytearray()
        model = ["--base", str(pair[0]), "--aligned", str(pair[1]), "--alpha", "0.5"]
        address = ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*EXPO_SERVE, *model, *address, "--enforce-eager", "--max-model-len", "64"],
            stdout=pipe[1],
            stderr=pipe[1],
            env=ENGINE_ENV,
        )
        self.family: list[psutil.Process] = []
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while self._is_read:
            self.output += os.read(self._pipe[0], PIPE_BYTES)

    def wait_ready(self) -> None:
        """Wait until it answers; its processes are then known."""
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                if self.health() == 200:
                    root = psutil.Process(self.process.pid)
                    self.family = [root, *root.children(recursive=True)]
                    return
            except httpx.TransportError:
                time.sleep(0.3)
        raise AssertionError(f"not ready: {self.output[-3000:].decode(errors='replace')}")

    def health(self) -> int:
        """Status of /health, which is to come within 10 s."""
        return httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=10).status_code

    def stall(self) -> None:
        """Let nobody read any more, and have it log more than all that is held on the way."""
        self._is_read = False
        self.health()  # a line, so that the reader wakes up
        self._reader.join()
        fill(self._pipe[1])
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        for _ in range(LINES):
            connection.request("GET", f"/health?{'a' * LINE_BYTES}")
            with connection.getresponse() as response:
                assert response.status == 200
                response.read()
        connection.close()

    def complete(self) -> int:
        """Status of a completion."""
        body = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 4}
        return httpx.post(f"http://127.0.0.1:{self.port}/v1/completions", json=body, timeout=60).status_code

    def read_notice(self) -> bytes:
        """Read again until the command says what was dropped."""
        output = b""
        while not NOTICE.search(output):
            output += os.read(self._pipe[0], PIPE_BYTES)
        return output

    def end(self) -> None:
        """Kill what is left."""
        self._is_read = False
        self.process.kill()  # the keeper ends the rest
        self.process.wait()
        for process in self.family:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture
def server(tiny_pair: tuple[Path, Path]) -> Iterator[Stalling]:
    """A server whose log is stalled."""
    segments = shared_memory()
    with new_pipe() as pipe:
        stalling = Stalling(tiny_pair, pipe)
        try:
            stalling.wait_ready()
            stalling.stall()
            yield stalling
        finally:
            stalling.end()
    assert_nothing_new(segments)


def test_it_answers_and_sigterm_ends_it(server: Stalling) -> None:
    assert [server.health(), server.complete(), server.health()] == [200, 200, 200]
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    assert_all_gone(server.family)


def test_sigkill_of_the_command_ends_it(server: Stalling) -> None:
    server.process.kill()
    assert_all_gone(server.family, within=15)


def test_it_says_what_was_dropped_and_stalls_again_while_its_engine_dies(server: Stalling) -> None:
    notice = NOTICE.search(server.read_notice())
    assert notice is not None
    assert 50 < int(notice[1]) < LINES
    assert server.complete() == 200
    server.stall()
    next(process for process in server.family if "EngineCore" in process.name()).kill()
    assert server.process.wait(ENGINE_DEATH_SECONDS) == 1
    assert_all_gone(server.family)
