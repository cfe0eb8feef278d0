"""The status port, as a process of its own."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import NamedTuple

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expo_serve.state.shared import SharedState

MAX_BYTES = 30 << 20


class Port(NamedTuple):
    """A running status process."""

    state: SharedState
    process: subprocess.Popen[bytes]
    address: tuple[str, int]

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{self.address[0]}:{self.address[1]}"

    def connect(self, timeout: float | None = None) -> socket.socket:
        """Open a connection."""
        return socket.create_connection(self.address, timeout)

    @contextmanager
    def crowd(self, number: int, timeout: float | None = None) -> Iterator[list[socket.socket]]:
        """Open connections, the oldest first, and close them at the end."""
        with ExitStack() as stack:
            yield [stack.enter_context(self.connect(timeout)) for _ in range(number)]


@pytest.fixture
def port() -> Iterator[Port]:
    """The status process of a command that is starting."""
    state = SharedState.create()
    now = time.monotonic()
    state.reporter("command", started=now, started_at=time.time(), alpha="0.5", phases={"resolve": now})
    listener = socket.create_server(("127.0.0.1", 0))
    descriptors = (listener.fileno(), state.descriptor)
    command = [sys.executable, "-m", "expo_serve.state.server", *map(str, descriptors)]
    with (
        closing(state),
        listener,
        subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=descriptors) as process,
    ):
        yield Port(state, process, listener.getsockname())
        process.kill()


def scraped(port: Port, within: float = 5.0) -> float:
    """When the metrics were read, which is noted after the answer."""
    deadline = time.monotonic() + within
    while "scraped" not in (status := port.state.reports("status")[0]) and time.monotonic() < deadline:
        time.sleep(0.01)
    found: float = status["scraped"]
    return found


def test_routes(port: Port) -> None:
    assert httpx.get(f"{port.url}/live").json() == {"live": True, "phase": "resolve"}
    ready = httpx.get(f"{port.url}/ready")
    assert ready.status_code == 503
    assert ready.json() == {"ready": False, "phase": "resolve", "reason": "the server starts: resolve"}
    keeper = port.state.reporter("keeper")
    keeper.enter("serving")
    assert httpx.get(f"{port.url}/ready?x=/y").status_code == 200
    assert httpx.get(f"{port.url}/state").json()["phase_seconds"].keys() == {"resolve", "serving"}
    assert httpx.head(f"{port.url}/state").content == b""
    httpx.head(f"{port.url}/metrics")
    assert all("scraped" not in report for report in port.state.reports("status"))
    metrics = httpx.get(f"{port.url}/metrics")
    assert 'expo_state_phase{phase="serving"} 1.0' in metrics.text
    assert metrics.headers["content-type"].startswith("text/plain")
    assert scraped(port) <= time.monotonic()
    keeper.enter("failed")
    assert httpx.get(f"{port.url}/live").status_code == 503


def test_nothing_of_a_request_comes_back(port: Port) -> None:
    for method, path, status in (("GET", "/secret", 404), ("POST", "/state", 405), ("POST", "/secret", 404)):
        answer = httpx.request(method, f"{port.url}{path}", headers={"X-Secret": "secret"})
        assert answer.status_code == status
        assert json.loads(answer.text)["error"]["code"] == status
        assert ("allow" in answer.headers) == (status == 405)
        assert "secret" not in answer.text + str(answer.headers)
    with port.connect() as connection:
        connection.sendall(b"GARBAGE secret <b>\r\n\r\n")
        assert b"secret" not in connection.recv(4096)


_PIECES = st.sampled_from(
    [
        b"GET /live HTTP/1.1",
        b"HEAD /state HTTP/1.0",
        b"CONNECT here:1 HTTP/1.1",
        b"OPTIONS * HTTP/1.1",
        b"GET //ready?x HTTP/1.1",
        b"Host: here",
        b"Host:",
        b"Content-Length: 5",
        b"Content-Length: -1",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: gzip",
        b"Connection: Upgrade",
        b"Upgrade: websocket",
        b"Expect: 100-continue",
        b"X-Secret: secret",
        b" folded",
        b"5\r\nbytes",
        b"0",
        b"",
        b"\x00secret\xff",
    ]
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(lines=st.lists(_PIECES | st.binary(max_size=20), max_size=12), end=st.sampled_from([b"\r\n\r\n", b"\n\n", b""]))
def test_whatever_is_sent_gets_clean_answers(port: Port, lines: list[bytes], end: bytes) -> None:
    """Whole answers one after the other, without anything of the request; and the port goes on."""
    with port.connect(5) as connection:
        got = b""
        with suppress(ConnectionError):
            connection.sendall(b"\r\n".join(lines) + end)
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(4096):
                got += piece
    assert b"secret" not in got
    statuses = re.findall(rb"HTTP/1.1 (\d+) [A-Z]", got)
    assert got.count(b"HTTP/1.1 ") == len(statuses)
    assert set(statuses) <= {b"100", b"200", b"400", b"404", b"405", b"431", b"501", b"503"}
    assert httpx.get(f"{port.url}/live", timeout=5).status_code == 200


def test_clients_that_say_nothing_do_not_keep_it_from_answering(port: Port) -> None:
    with port.crowd(40) as silent:
        assert httpx.get(f"{port.url}/live", timeout=5).status_code == 200
        with port.crowd(60):  # beyond what is held open
            assert httpx.get(f"{port.url}/live", timeout=5).status_code == 200
            assert silent[0].recv(1) == b""


def test_however_many_come_at_once_the_newest_stay(port: Port) -> None:
    httpx.get(f"{port.url}/live")
    process = psutil.Process(port.process.pid)
    before = process.num_fds()
    process.suspend()  # they wait in its queue, to be taken all at once
    with port.crowd(90) as silent:
        process.resume()
        assert httpx.get(f"{port.url}/live", timeout=5).status_code == 200
        assert process.num_fds() <= before + 64
        assert silent[0].recv(1) == b""
        silent[-1].sendall(b"GET /live HTTP/1.1\r\nHost: here\r\n\r\n")
        assert silent[-1].recv(4096).startswith(b"HTTP/1.1 200")


def test_spaces_take_no_time(port: Port) -> None:
    """Which h11 alone would take a second for: it tries to end a header's value at each of them."""
    httpx.get(f"{port.url}/live")
    used = sum(psutil.Process(port.process.pid).cpu_times()[:2])
    for gap in (b" " * 15_900, b"\t " * 7_900):
        with port.connect(20) as connection:
            connection.sendall(b"GET /live HTTP/1.1\r\nHost: here\r\na:" + gap + b"\x00\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert sum(psutil.Process(port.process.pid).cpu_times()[:2]) - used < 0.5
    spaces = " " * 200
    assert httpx.get(f"{port.url}/live", headers={"X-Some": f"a{spaces}b"}).status_code == 200


def test_a_scrape_that_is_cut_off_is_none(port: Port) -> None:
    httpx.get(f"{port.url}/live")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(port.address)
        slow.sendall(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n" * 3000)
        seen = [scraped(port)]
        while len(seen) < 5 or seen[-5] != seen[-1]:  # until it waits for the client
            time.sleep(0.4)
            seen.append(scraped(port))
        with port.crowd(70):
            assert httpx.get(f"{port.url}/live", timeout=5).status_code == 200
            assert scraped(port) == seen[-1]


def test_a_client_that_never_reads_takes_no_memory(port: Port) -> None:
    httpx.get(f"{port.url}/live")
    with port.crowd(20, timeout=0.5) as greedy:
        for connection in greedy:
            with suppress(OSError):
                for _ in range(200):
                    connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n" * 100)
        assert httpx.get(f"{port.url}/live", timeout=5).status_code == 200
        assert psutil.Process(port.process.pid).memory_full_info().pss < MAX_BYTES


def test_requests_without_end_take_no_memory(port: Port) -> None:
    """Whatever comes is read up to a bound, for each of the connections."""
    httpx.get(f"{port.url}/live")
    answers = []
    for first in (b"GET /live HTTP/1.1\r\n", b"GET /"):
        for _ in range(30):
            with port.connect(5) as connection, suppress(OSError):
                connection.sendall(first)
                for name in range(90):
                    connection.sendall(b"X-%d: " % name + b"x" * 60_000 + b"\r\n")
                answers.append(connection.recv(100))
    assert httpx.get(f"{port.url}/live", headers={"X-Long": "x" * 15_000}).status_code == 200
    assert httpx.get(f"{port.url}/live", headers={"X-Long": "x" * 18_000}).status_code == 431
    assert psutil.Process(port.process.pid).memory_full_info().pss < MAX_BYTES


def test_requests_follow_each_other_on_a_connection(port: Port) -> None:
    """Sent before the first answer, with a body that nobody reads, and by a client of HTTP/1.0."""
    request = b"GET /live HTTP/1.1\r\nHost: here\r\n"
    for sent, expected in (
        (request + b"\r\n" + request + b"Connection: close\r\n\r\n", 2),
        (request + b"Content-Length: 4\r\n\r\nbody" + request + b"\r\n", 1),
        (request + b"Content-Length: 0\r\n\r\n" + request + b"Connection: close\r\n\r\n", 2),
        (b"GET /live HTTP/1.0\r\n\r\n" + request + b"\r\n", 1),
    ):
        with port.connect(5) as connection:
            connection.sendall(sent)
            got = b""
            while piece := connection.recv(4096):
                got += piece
            assert got.count(b"HTTP/1.1 200 OK") == got.count(b'"live": true') == expected
            assert got.lower().count(b"connection: close") == 1  # said by the last one


def test_one_thread_answers_all(port: Port) -> None:
    """Where all cores are busy, each further thread that an answer needs would wait for its turn."""
    with httpx.Client(base_url=port.url) as one, httpx.Client(base_url=port.url) as other:
        assert {client.get("/ready").status_code for client in (one, other)} == {503}
        assert psutil.Process(port.process.pid).num_threads() == 1


def test_it_is_small_and_imports_nothing_big(port: Port) -> None:
    httpx.get(f"{port.url}/metrics")
    assert psutil.Process(port.process.pid).memory_full_info().pss < MAX_BYTES


def test_it_ends_with_the_command_only(port: Port) -> None:
    httpx.get(f"{port.url}/live")
    for number in (1, 2, 3, 15):
        os.kill(port.process.pid, number)
    assert httpx.get(f"{port.url}/live").status_code == 200
    assert port.process.stdin is not None
    with port.connect() as silent:
        silent.sendall(b"GET /live HTTP/1.1\r\n")
        port.process.stdin.close()
        assert port.process.wait(5) == 0
