"""A real server as its operator sees it: its state from second 0, its drain, a hang, a death."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import psutil
import pytest

from expo_serve.state.snapshot import PHASES
from tests.server import Server, free_port, run_command
from tests.vllm_plugin.trees import assert_all_gone, assert_nothing_new, last_line, shared_memory

pytestmark = pytest.mark.engine
DEATH_SECONDS = 40.0
LOAD_SECONDS = 900.0
MAX_BYTES = 80 << 20


class Operated(Server):
    """A server with a status port."""

    def __init__(self, pair: tuple[Path, Path], folder: Path, *flags: str) -> None:
        self.status_port = free_port()
        self.began = time.monotonic()
        model = ["--base", str(pair[0]), "--aligned", str(pair[1]), "--alpha", "0.5", "--served-model-name", "m"]
        running = ["--enforce-eager", "--max-model-len", "2048", "--status-port", str(self.status_port)]
        self.temporary = Path(tempfile.mkdtemp(prefix="t"))  # not in the test's own, which is too long for a socket
        super().__init__([*model, *running, *flags], folder / "log", TMPDIR=str(self.temporary))

    def wait_ready(self, timeout: float = 240) -> Operated:
        """Wait until /health answers 200."""
        super().wait_ready(timeout)
        return self

    def status(self, path: str) -> httpx.Response:
        """GET from the status port."""
        return httpx.get(f"http://127.0.0.1:{self.status_port}{path}", timeout=10)

    def state(self) -> dict[str, Any]:
        """All of the state."""
        state: dict[str, Any] = self.status("/state").json()
        return state

    def wait_for(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        """Wait until something holds; until then the status port may not be there."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if condition():
                    return
            except httpx.TransportError:
                assert self.process.poll() is None, self.tail()
            time.sleep(0.05)
        raise AssertionError(f"that never came:\n{self.tail()}")

    def titled(self, part: str) -> psutil.Process:
        """The process whose title holds a text."""
        return next(process for process in self.family() if part in " ".join(process.cmdline()))


class Stream:
    """A client that reads a stream to its end, in a thread."""

    def __init__(self, server: Server, tokens: int, prompt: tuple[int, ...] = (1, 2, 3), timeout: float = 120) -> None:
        self.lines: list[str] = []
        self.error: Exception | None = None
        self._timeout = timeout
        self._request = {"model": "m", "prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}
        self._url = f"{server.url}/v1/completions"
        self.thread = Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._request, timeout=self._timeout) as answer:
                for line in answer.iter_lines():
                    self.lines += [line] if line else []
        except httpx.HTTPError as error:
            self.error = error

    @property
    def last(self) -> Any:
        """The last event."""
        return self.lines[-1].removeprefix("data: ")


@pytest.fixture
def begin(demo_pair: tuple[Path, Path], tmp_path: Path) -> Iterator[Callable[..., Operated]]:
    """Starts a server; whatever is left in the end is a failure, and killed."""
    segments = shared_memory()
    servers: list[Operated] = []

    def start(*flags: str) -> Operated:
        folder = tmp_path / str(len(servers))
        folder.mkdir()
        servers.append(Operated(demo_pair, folder, *flags))
        return servers[-1]

    try:
        yield start
    finally:
        for server in servers:
            server.process.kill()
            server.process.wait()
    assert_nothing_new(segments)
    for server in servers:
        left = [path.name for path in server.temporary.iterdir() if path.name != f"torchinductor_{os.getuid()}"]
        shutil.rmtree(server.temporary)
        assert left == []


def open_requests(server: Operated) -> int:
    """Requests that are being answered."""
    return int(server.state()["requests"]["open"])


def test_from_second_0_through_a_drain_to_the_end(begin: Callable[..., Operated]) -> None:
    server = begin("--shutdown-timeout", "5")
    server.wait_for(lambda: server.status("/live").status_code == 200, 30)
    first = server.state()
    assert first["phase"] in ("resolve", "start")
    assert first["uptime_seconds"] < 3
    seen = {first["phase"]}
    assert "not ready: " in run_command("probe", "--state", "--url", f"http://127.0.0.1:{server.status_port}").stderr

    def is_serving() -> bool:
        seen.add(server.state()["phase"])
        return server.get("/health").status_code == 200

    with pytest.raises(httpx.TransportError):
        is_serving()
    healthy = ready = 0.0
    while not (healthy and ready):
        seen.add(server.state()["phase"])
        with suppress(httpx.TransportError):
            healthy = healthy or (time.monotonic() if server.get("/health").status_code == 200 else 0.0)
        ready = ready or (time.monotonic() if server.status("/ready").status_code == 200 else 0.0)
        assert server.process.poll() is None, server.tail()
        time.sleep(0.02)
    assert abs(ready - healthy) < 2
    assert {"start", "warm_up"} <= seen <= set(PHASES)
    state = server.state()
    assert state["load"]["ranks"][0]["is_done"]
    assert state["load"]["done_bytes"] == state["load"]["total_bytes"] > 0
    assert (state["alpha"], state["served_model_names"]) == ("0.5", ["m"])
    assert "expo_state_ready 1.0" in server.status("/metrics").text
    address = ["--url", f"http://127.0.0.1:{server.status_port}"]
    assert run_command("probe", "--state", *address, "--alpha", "0.5", "--served-model-name", "m").returncode == 0
    mine = [process for process in server.family() if "expo_serve." in " ".join(process.cmdline())]
    parts = [process for process in mine if "vllm_plugin" not in " ".join(process.cmdline())]
    small = [server.family()[0], *parts]
    assert len(small) == 3
    assert sum(process.memory_full_info().pss for process in small) < MAX_BYTES

    short, long = Stream(server, 40), Stream(server, 1900)
    server.wait_for(lambda: bool(short.lines and long.lines), 20)
    family = server.family()
    server.process.terminate()
    server.wait_for(lambda: server.status("/ready").status_code == 503, 2)
    assert server.status("/live").status_code == 200
    assert server.get("/health").status_code == server.get("/v1/expo").status_code == 503
    assert "not ready: drains" in run_command("probe", "--state", *address).stderr
    refused = server.post("/v1/completions", {"model": "m", "prompt": [1], "max_tokens": 1})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.headers["x-expo-alpha"] == "0.5"
    assert refused.json()["error"]["type"] == "service_unavailable_error"
    assert server.process.wait(40) == 0
    assert_all_gone(family)
    for stream in (short, long):
        stream.thread.join(10)
        assert stream.error is None
    assert short.last == "[DONE]"
    assert "is cut" in json.loads(long.last)["error"]["message"]
    assert "1 request was cut: still open 5 s after the signal" in server.text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_clean_stop_by_other_signals(begin: Callable[..., Operated], number: int) -> None:
    server = begin("--shutdown-timeout", "60").wait_ready()
    stream = Stream(server, 300)
    server.wait_for(lambda: open_requests(server) == 1, 20)
    server.process.send_signal(number)
    assert server.process.wait(60) == 0
    stream.thread.join(10)
    assert stream.last == "[DONE]"


@pytest.mark.slow
@pytest.mark.parametrize("with_load", [False, True], ids=["at rest", "with streams"])
@pytest.mark.parametrize("part", ["VLLM::EngineCore", "VLLM::Worker", "vllm_plugin.server"])
def test_a_process_that_is_stopped_is_noticed(begin: Callable[..., Operated], part: str, with_load: bool) -> None:
    server = begin("--engine-timeout", "8").wait_ready()
    server.wait_for(lambda: server.status("/ready").status_code == 200)
    streams = [Stream(server, 1900) for _ in range(3)] if with_load else []
    if with_load:
        server.wait_for(lambda: open_requests(server) == 3, 20)
    family = server.family()
    began = time.monotonic()
    server.titled(part).suspend()
    server.wait_for(lambda: server.status("/ready").status_code == 503, 30)
    assert 6 < time.monotonic() - began < 20
    if part != "vllm_plugin.server":
        assert server.get("/health").status_code == 503
    assert "expo_state_engine_hung 1.0" in server.status("/metrics").text
    assert server.process.wait(60) == 1
    assert_all_gone(family)
    title = "vLLM's API server" if part == "vllm_plugin.server" else part
    assert re.search(rf"has not answered for \d+ s: {title}\S* \(process \d+, stopped\) hung", last_line(server))
    assert "most recent call first" in server.text()
    for stream in streams:
        stream.thread.join(20)
        assert not stream.thread.is_alive()


@contextmanager
def slowed(server: Server, burners: int = 1) -> Iterator[None]:
    """A server as on a slow machine: all of its threads share one core with others who compute."""
    core = max(os.sched_getaffinity(0))
    for process in server.family():
        for thread in process.threads():
            os.sched_setaffinity(thread.id, {core})
    burn = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", burn]) for _ in range(burners)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.slow
@pytest.mark.timeout(LOAD_SECONDS + 300)
def test_watchdog_takes_no_load_for_a_hang(begin: Callable[..., Operated]) -> None:
    """Long prompts among many streams on a slow machine: a step takes several times as long as the timeout."""
    server = begin("--engine-timeout", "6").wait_ready()
    server.wait_for(lambda: server.status("/ready").status_code == 200)
    began = time.monotonic()
    with slowed(server):
        lengths = [1800 if number % 8 == 0 else 20 for number in range(64)]
        prompts = [tuple(range(number, number + length)) for number, length in enumerate(lengths)]
        streams = [Stream(server, 20, prompt, LOAD_SECONDS) for prompt in prompts]
        while any(stream.thread.is_alive() for stream in streams):
            answer = server.status("/state").json()
            assert answer["ready"], answer
            assert server.get("/health").status_code == 200
            assert time.monotonic() - began < LOAD_SECONDS
            time.sleep(0.2)
    assert all(stream.error is None and stream.last == "[DONE]" for stream in streams)
    assert "has not answered" not in server.text()
    assert server.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("part", ["VLLM::EngineCore", "VLLM::Worker", "vllm_plugin.server", "expo_serve.cli.keeper"])
def test_killed_process_is_named(begin: Callable[..., Operated], part: str) -> None:
    server = begin().wait_ready()
    family = server.family()
    server.titled(part).kill()
    assert server.process.wait(DEATH_SECONDS) == 1
    assert_all_gone(family)
    assert "was killed by SIGKILL" in last_line(server)
    assert part.startswith("VLLM") == (part in last_line(server))


@pytest.mark.slow
def test_two_machines_of_which_one_has_no_port(begin: Callable[..., Operated]) -> None:
    """The second one serves once it has its weights, and ends as cleanly as the first.

    No request is sent: vLLM's pipeline over two machines fails on CPU, at its first step.
    """
    common = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    first, second = (
        begin(*common, "--pipeline-parallel-size", "2", "--node-rank", str(rank), *flags)
        for rank, flags in enumerate(([], ["--headless"]))
    )
    first.wait_ready(480)
    second.wait_for(lambda: second.status("/ready").status_code == 200, 5)
    assert [rank["rank"] for server in (first, second) for rank in server.state()["load"]["ranks"]] == [0, 1]
    families = [server.family() for server in (first, second)]
    for server in (first, second):
        server.process.terminate()
    assert [server.process.wait(60) for server in (first, second)] == [0, 0]
    for family in families:
        assert_all_gone(family)


@pytest.mark.slow
def test_port_that_is_taken(begin: Callable[..., Operated], tiny_pair: tuple[Path, Path]) -> None:
    server = begin()
    server.wait_for(lambda: server.status("/live").status_code == 200, 30)
    model = ["--base", str(tiny_pair[0]), "--aligned", str(tiny_pair[1]), "--alpha", "0.5", "--host", "127.0.0.1"]
    other = run_command(*model, "--status-port", str(server.status_port), timeout=30)
    assert other.returncode == 1
    assert f"port {server.status_port} of 127.0.0.1 cannot be had" in other.stderr.splitlines()[-1]
    server.wait_ready()
    other = run_command(*model, "--port", str(server.port), timeout=120)
    assert other.returncode == 1
    assert re.search(rf"error: --port: port {server.port} of .* is taken by .*process", other.stderr.splitlines()[-1])


@pytest.mark.slow
def test_what_vllm_refuses_is_2_with_its_sentence(tiny_pair: tuple[Path, Path]) -> None:
    model = ["--base", str(tiny_pair[0]), "--aligned", str(tiny_pair[1]), "--alpha", "0.5", "--port", str(free_port())]
    for flags, sentence in (
        (["--tensor-parallel-size", "3"], "must be divisible by tensor parallel size"),
        (["--max-model-len", "100000000"], "max_model_len"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ):
        found = run_command(*model, *flags, timeout=120)
        assert found.returncode == 2, found.stderr
        assert sentence in found.stderr.splitlines()[-1]
        assert "ValidationError" not in found.stderr.splitlines()[-1]
