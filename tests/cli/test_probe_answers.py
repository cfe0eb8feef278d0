"""What ``expo-serve probe`` makes of servers that mean it no good, and of those that never end an answer."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import time
from collections.abc import Callable

import pytest

from expo_serve.cli.asking import MAX_BYTES
from tests.cli.http_servers import REPORT, answering, sending, talking
from tests.command import assert_refusal, refused, run_here
from tests.server import run_command

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
GOOD = OK + json.dumps(REPORT).encode()
KEY = "a-key-that-no-other-host-may-see"


def one_line(*arguments: str, words: tuple[str, ...] = (), **environment: str) -> str:
    """Ask for alpha -0.5; one clean line says why not, with exit code 1."""
    printed = refused("probe", "--alpha=-0.5", *arguments, words=words, code=1, **environment)
    assert printed.endswith("\n")
    assert printed[:-1].isprintable(), repr(printed)
    assert len(printed) < 700
    return printed


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("is_same_host", [True, False])
def test_no_redirect_is_followed(status: int, is_same_host: bool) -> None:
    received: list[bytes] = []
    with talking(lambda _, request: received.append(request)) as other:
        target = "/elsewhere" if is_same_host else f"{other}/v1/expo"
        with answering(b"", status, Location=target) as url:
            one_line("--url", url, words=("redirect", str(status), target), VLLM_API_KEY=KEY)
    assert received == []


def test_no_redirect_of_a_completion_is_followed() -> None:
    received: list[bytes] = []

    def talk(connection: socket.socket, request: bytes) -> None:
        received.append(request)
        moved = f"HTTP/1.1 307 Moved\r\nLocation: {there}/\r\nContent-Length: 0\r\n\r\n".encode()
        connection.sendall(moved if request.startswith(b"POST") else GOOD)

    with talking(lambda _, request: received.append(request)) as there, talking(talk) as url:
        one_line("--url", url, "--completion", words=("/v1/completions redirects", there), VLLM_API_KEY=KEY)
    assert [request.split(b" ")[0] for request in received] == [b"GET", b"POST"]


@pytest.mark.parametrize("key", ["plain", "clé", "鍵", os.fsdecode(b"not-utf-8-\xff"), "with space"])
def test_key_arrives_byte_by_byte(key: str) -> None:
    received: list[bytes] = []

    def talk(connection: socket.socket, request: bytes) -> None:
        received.append(request)
        connection.sendall(GOOD)

    with talking(talk) as url:
        assert run_here("probe", "--url", url, "--alpha=-0.5", VLLM_API_KEY=key).returncode == 0
    assert b"\r\nAuthorization: Bearer " + os.fsencode(key) + b"\r\n" in received[0]


@pytest.mark.parametrize("key", ["", " ", "\n", "secret\n", " secret", "sec\nret", "sec\x7fret"])
def test_key_that_no_request_can_send_is_refused(key: str) -> None:
    printed = refused("probe", "--alpha", "1", words=("VLLM_API_KEY",), VLLM_API_KEY=key)
    assert len(printed.splitlines()) == 1
    assert "sec" not in printed.replace("a secret made with echo", "")


FOREIGN = {
    "list": b"[]",
    "number": b"1",
    "no names": b'{"alpha":-0.5}',
    "names are a string": b'{"alpha":-0.5,"served_model_names":"first"}',
    "a name is a number": b'{"alpha":-0.5,"served_model_names":["first",1]}',
    "a name is a list": b'{"alpha":-0.5,"served_model_names":[["first"]]}',
    "alpha is a string": b'{"alpha":"-0.5","served_model_names":["first"]}',
    "alpha is true": b'{"alpha":true,"served_model_names":["first"]}',
    "alpha is deep": b'{"alpha":' + b"[" * 900 + b"]" * 900 + b',"served_model_names":["first"]}',
}


@pytest.mark.parametrize("body", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("name", [[], ["--served-model-name", "first"]])
def test_report_of_something_else(body: bytes, name: list[str]) -> None:
    with sending(OK + body) as url:
        one_line("--url", url, *name, words=("not from expo-serve",))


ALPHAS = {"NaN": "nan", "1e999": "inf", "9" * 400: "9999", "-0.500001": "-0.500001", "0": "serves alpha 0,"}


@pytest.mark.parametrize(("alpha", "shown"), ALPHAS.items(), ids=lambda text: text[:9])
def test_alpha_that_is_another_number(alpha: str, shown: str) -> None:
    with sending(OK + b'{"alpha":%s,"served_model_names":[]}' % alpha.encode()) as url:
        one_line("--url", url, words=("serves alpha", shown, "expected -0.5"))


NO_JSON = {
    "nothing": b"",
    "HTML": b"<html>",
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 40_000,
    "closed deep lists": b"[" * 100_000 + b"]" * 100_000,
    "not UTF-8": b'{"alpha": "\xff\xfe"}',
    "a long number": b'{"alpha":' + b"1" * 5000 + b"}",
    "two values": b"{}{}",
    "zeros": b"\0" * 1000,
    "cut": GOOD[len(OK) : -5],
}


@pytest.mark.parametrize("body", NO_JSON.values(), ids=NO_JSON)
def test_body_that_is_no_json(body: bytes) -> None:
    with sending(OK + body) as url:
        one_line("--url", url, words=("not JSON",))


NO_HTTP = {
    "nothing": b"",
    "garbage": bytes(range(256)) * 10,
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "escape sequences": b"\x1b]0;owned\x07\x1b[2J\x1b[31mred\r\n\r\n",
    "status is no number": b"HTTP/1.1 OK 200\r\n\r\n",
    "an endless line": b"HTTP/1.1 200 " + b"A" * 100_000,
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
    "a chunk that is none": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "a chunk that is cut": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{}",
}


@pytest.mark.parametrize("answer", NO_HTTP.values(), ids=NO_HTTP)
def test_answer_that_is_no_http(answer: bytes) -> None:
    with sending(answer) as url:
        one_line("--url", url, words=("/v1/expo ",))


CONTROL = "\x1b]0;owned\x07\x1b[2J\u202e\x85\nexpo-serve: error: no\u2028"


def test_text_of_a_server_cannot_steer_the_terminal() -> None:
    body = json.dumps({"alpha": -0.5, "served_model_names": [CONTROL, "\ud800", "é"]}).encode()
    with sending(OK + body) as url:
        assert r"\x1b]0;owned\x07\x1b[2J\u202e\x85\nexpo" in one_line("--url", url, "--served-model-name", "other")
    with sending(b"HTTP/1.1 500 \x1b[31mNo\x1b[0m\x9b2J\r\n\r\n") as url:
        one_line("--url", url, words=("answered 500", r"\x1b[31mNo"))
    with sending(b"HTTP/1.1 302 Found\r\nLocation: http://x/\x1b[2J\x9b\r\n\r\n") as url:
        one_line("--url", url, words=("redirects to", r"\x1b[2J"))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_completion_is_printed_in_one_line(encoding: str) -> None:
    answer = {**REPORT, "choices": [{"text": CONTROL + "巴黎" + "\ud800" + "x" * 10_000}]}
    with sending(OK + json.dumps(answer).encode()) as url:
        result = run_command("probe", "--url", url, "--alpha=-0.5", "--completion", PYTHONIOENCODING=encoding)
    assert result.returncode == 0, result.stderr
    assert "serves alpha -0.5, and answers '" in result.stdout
    assert ("巴黎" if encoding == "utf-8" else r"\u5df4\u9ece") in result.stdout
    assert result.stdout.endswith("\n")
    assert result.stdout[:-1].isprintable()
    assert len(result.stdout) < 500


NO_TEXT = [
    '{"error":"x"}',
    '{"choices":[]}',
    '{"choices":{"0":1}}',
    '{"choices":[{"text":[]}]}',
    '{"choices":[1]}',
    "1",
]


@pytest.mark.parametrize("body", NO_TEXT)
def test_completion_without_text(body: str) -> None:
    def talk(connection: socket.socket, request: bytes) -> None:
        connection.sendall(OK + body.encode() if request.startswith(b"POST") else GOOD)

    with talking(talk) as url:
        one_line("--url", url, "--completion", words=("/v1/completions", "without a completion"))


def test_completion_of_a_server_without_a_name() -> None:
    with sending(OK + b'{"alpha":-0.5,"served_model_names":[]}') as url:
        one_line("--url", url, "--completion", words=("names no model",))


@pytest.mark.parametrize("length", [b"", b"Content-Length: 99999999999\r\n"])
def test_largest_answer(length: bytes) -> None:
    space = b" " * (MAX_BYTES - len(GOOD) + len(OK))
    with sending(GOOD + space) as url:
        assert run_here("probe", "--url", url, "--alpha=-0.5").returncode == 0
    with sending(OK[:-2] + length + b"\r\n" + b" " * (MAX_BYTES + 1)) as url:
        one_line("--url", url, words=("more than 4 MiB",))


def _trickle(first: bytes, piece: bytes) -> Callable[[socket.socket, bytes], None]:
    def talk(connection: socket.socket, request: bytes) -> None:
        connection.sendall(first)
        for _ in range(40):
            connection.sendall(piece)
            time.sleep(0.1)

    return talk


ENDLESS = {
    "silence": _trickle(b"", b""),
    "a status line by the byte": _trickle(b"HTTP/1.1 200 ", b"x"),
    "headers by the byte": _trickle(b"HTTP/1.1 200 OK\r\nA: ", b"x"),
    "a body by the byte": _trickle(OK, b" "),
    "go on, and on": _trickle(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "empty lines of a chunk": _trickle(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
}


@pytest.mark.parametrize("talk", ENDLESS.values(), ids=ENDLESS)
def test_timeout_bounds_an_answer_without_end(talk: Callable[[socket.socket, bytes], None]) -> None:
    with talking(talk) as url:
        started = time.monotonic()
        one_line("--url", url, "--timeout", "0.3", words=("did not answer within 0.3 s",))
        assert time.monotonic() - started < 3


def test_timeout_bounds_the_report_and_the_completion_together() -> None:
    def talk(connection: socket.socket, _: bytes) -> None:
        time.sleep(0.4)
        connection.sendall(GOOD)

    with talking(talk) as url:
        one_line("--url", url, "--completion", "--timeout", "0.6", words=("did not answer within 0.6 s",))


def test_timeout_bounds_the_whole_command() -> None:
    """The process ends too, with the thread that still waits."""
    with talking(_trickle(OK, b" ")) as url:
        started = time.monotonic()
        result = run_command("probe", "--url", url, "--alpha", "1", "--timeout", "0.5")
        assert time.monotonic() - started < 10
    assert_refusal(result, ("did not answer within 0.5 s",), code=1)


def test_timeout_bounds_a_connection_that_is_not_taken() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        waiting = [socket.socket() for _ in range(3)]  # the queue is full
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        one_line("--url", f"http://127.0.0.1:{port}", "--timeout", "0.3", words=("did not answer within 0.3 s",))
        for client in waiting:
            client.close()


def test_timeout_bounds_the_resolver_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def never_answering(*_: object, **__: object) -> list[object]:
        time.sleep(3)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", never_answering)
    one_line("--url", "http://a-name:8000", "--timeout", "0.3", words=("did not answer within 0.3 s",))


def test_server_without_encryption_is_not_asked_by_https() -> None:
    with sending(GOOD) as url:
        one_line("--url", url.replace("http:", "https:"), words=("does not answer", "SSL"))


def test_any_answer_gives_one_line() -> None:
    """Good and bad answers, changed at random (a fixed seed)."""
    rng = random.Random(20)
    pieces = [b"\r\n", b"\n", b"\0", b"\xff", b"HTTP/1.1 ", b"chunked", b"-1", b"{", b"[", b'"', b"\\ud800", b"\x1b[2J"]
    seeds = [GOOD, *NO_HTTP.values(), b"HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n", b"HTTP/1.0 500 No\r\n\r\n{}"]
    current = [b""]
    with talking(lambda connection, _: connection.sendall(current[0])) as url:
        for _ in range(300):
            changed = bytearray(rng.choice(seeds))
            for _ in range(rng.randint(1, 5)):
                start = rng.randrange(len(changed) + 1)
                changed[start : start + rng.choice((0, 0, 1, 9))] = rng.choice(pieces)
            current[0] = bytes(changed)
            result = run_here("probe", "--url", url, "--alpha=-0.5")
            assert result.returncode == (1 if result.stderr else 0), current
            assert re.fullmatch(r"(expo-serve: error: [^\n]+\n)?", result.stderr), (current, result.stderr)
