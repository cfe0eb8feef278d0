"""Whatever becomes of the reader of the log: the server answers, and ends with all of its processes when it is to."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from expo_serve.cli.outlet import LIMIT_BYTES
from tests.cli.log_server import TITLE
from tests.cli.pipes import NOTICE, PIPE_BYTES, close, dropped, new_pipe
from tests.server import free_port
from tests.vllm_plugin.trees import assert_all_gone

ROOT = Path(__file__).parents[2]
LINES = 2000
"""Of 100 bytes, for each request."""
FLOOD = 3 * LIMIT_BYTES // (LINES * 100)
"""Requests whose log is more than all that may be held on the way."""


class Watched:
    """A keeper and its server; ``output`` is where their log goes, and ``errors`` where standard error does."""

    def __init__(self, output: int, *arguments: str, errors: int | None = None) -> None:
        self.port = free_port()
        self.keeper = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.log_keeper", *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output if errors is None else errors,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},  # the keeper gives the server PYTHONSAFEPATH
        )
        self._tell(json.dumps({"port": self.port, "lines": LINES}).encode() + b"\n")
        self.family: list[psutil.Process] = []

    def wait_ready(self) -> Watched:
        """Wait until the keeper has seen that the server serves."""
        deadline = time.monotonic() + 20
        while not any(process.cmdline()[:1] == [TITLE] for process in self._members()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.family = self._members()
        return self

    def _members(self) -> list[psutil.Process]:
        root = psutil.Process(self.keeper.pid)
        return [root, *root.children(recursive=True)]

    def ask(self) -> bytes:
        """Have it log, and return its answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(b"?")
            return connection.recv(16)

    def flood(self) -> None:
        """Have it log more than all that may be held; every request is answered."""
        assert [self.ask() for _ in range(FLOOD)] == [b"ok"] * FLOOD

    def signal(self, number: int) -> None:
        """Pass a signal on, as the command does."""
        self._tell(bytes([number]))

    def _tell(self, data: bytes) -> None:
        assert self.keeper.stdin is not None
        os.write(self.keeper.stdin.fileno(), data)

    def hang_up(self) -> None:
        """End its input, as the end of the command does."""
        assert self.keeper.stdin is not None
        self.keeper.stdin.close()

    def end(self) -> None:
        """Kill what is left."""
        for process in self._members() if self.keeper.poll() is None else self.family:
            with suppress(psutil.Error):
                process.kill()
        self.hang_up()
        self.keeper.wait()


Start = Callable[..., Watched]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a keeper whose log goes to a file descriptor."""
    with ExitStack() as stack:

        def started(output: int, *arguments: str, errors: int | None = None) -> Watched:
            watched = Watched(output, *arguments, errors=errors)
            stack.callback(watched.end)
            return watched

        yield started


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe that nobody reads yet."""
    with new_pipe() as ends:
        yield ends


def sigterm(watched: Watched) -> None:
    watched.signal(signal.SIGTERM)


def two_signals(watched: Watched) -> None:
    watched.signal(signal.SIGINT)
    watched.signal(signal.SIGTERM)


def sigkill_of_the_command(watched: Watched) -> None:
    watched.hang_up()


def server_killed(watched: Watched) -> None:
    watched.family[1].kill()


@pytest.mark.parametrize(
    ("happen", "code"), [(sigterm, 0), (two_signals, 143), (sigkill_of_the_command, 1), (server_killed, 1)]
)
def test_all_ends_while_nobody_reads(
    start: Start, pipe: tuple[int, int], happen: Callable[[Watched], None], code: int
) -> None:
    watched = start(pipe[1]).wait_ready()
    watched.flood()
    happen(watched)
    assert watched.keeper.wait(15) == code
    assert_all_gone(watched.family, within=5)


def test_every_line_is_read_or_counted(start: Start, pipe: tuple[int, int], tmp_path: Path) -> None:
    """Standard output stalls and goes on; standard error, in a file, loses nothing meanwhile."""
    with (tmp_path / "errors").open("wb") as errors:
        watched = start(pipe[1], errors=errors.fileno()).wait_ready()
    close(pipe[1])
    watched.flood()
    output = b""
    while not NOTICE.search(output):
        output += os.read(pipe[0], PIPE_BYTES)
    watched.signal(signal.SIGTERM)
    while part := os.read(pipe[0], PIPE_BYTES):
        output += part
    assert watched.keeper.wait(15) == 0
    assert len(NOTICE.findall(output)) == 1
    numbers = [int(line) for line in NOTICE.sub(b"", output).splitlines()]
    assert numbers == list(range(0, 2 * len(numbers), 2))
    assert len(numbers) + dropped(output) == FLOOD * LINES // 2
    assert [int(line) for line in (tmp_path / "errors").read_text().splitlines()] == list(range(1, FLOOD * LINES, 2))


def test_closed_output_costs_nothing(start: Start, pipe: tuple[int, int]) -> None:
    watched = start(pipe[1]).wait_ready()
    close(pipe[1])
    close(pipe[0])
    watched.flood()
    watched.signal(signal.SIGTERM)
    assert watched.keeper.wait(15) == 0
    assert_all_gone(watched.family, within=5)


def test_memory_does_not_follow_the_log(start: Start, pipe: tuple[int, int]) -> None:
    watched = start(pipe[1]).wait_ready()
    before = watched.family[0].memory_info().rss
    watched.flood()
    assert watched.family[0].memory_info().rss - before < 3 * LIMIT_BYTES


def test_keeper_that_fails_leaves_nothing(start: Start, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        watched = start(log.fileno(), "broken")
    family = psutil.Process(watched.keeper.pid)
    assert watched.keeper.wait(20) == 1
    assert_all_gone([family], within=5)
    with pytest.raises(OSError, match="refused"):
        watched.ask()
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("expo-serve: error: the process that watches vLLM failed at log_keeper.py:")
    assert last.endswith(": ZeroDivisionError: of this test")
