"""What a hostile client sends, to the session's server: the answers keep the promises of ``loadtests.fuzz.http``."""

from __future__ import annotations

import json
import random
import time

import pytest

from loadtests.fuzz.answers import Answer, parse, problems
from loadtests.fuzz.http import routes, send
from loadtests.fuzz.messages import Drawer, Message
from tests.conftest import ALPHA, API_KEY
from tests.server import Server

_KEY = f"Authorization: Bearer {API_KEY}\r\n".encode()
_ASK = json.dumps({"model": "first", "prompt": "Hello", "max_tokens": 1}).encode()
_WEBSOCKET = (
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Version: 13\r\n"
)


def request(line: bytes, headers: bytes = b"", body: bytes = b"", *, host: bytes = b"x") -> bytes:
    """One request, after which the server closes the connection."""
    length = b"Content-Length: %d\r\n" % len(body) if body else b""
    return line + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n" + headers + length + b"\r\n" + body


WITHOUT_KEY = {
    "plain": request(b"GET /v1/expo"),
    "an open route in the host": request(b"GET /v1/expo", host=b"x/health?"),
    "dots behind an open route": request(b"GET /health/../v1/expo"),
    "dots in percent notation": request(b"GET /metrics/%2e%2e/v1/expo"),
    "slashes": request(b"GET //v1/expo"),
    "slashes in percent notation": request(b"GET /v1%2fexpo"),
    "all in percent notation": request(b"GET /%76%31/%65%78%70%6f"),
    "another address": request(b"GET http://x/v1/expo"),
    "an address of an open route": request(b"GET http://x/health?/v1/expo"),
    "end of text": request(b"GET /health%00/../v1/expo"),
    "a parameter": request(b"GET /v1/expo;/health"),
    "a backslash": request(b"GET /health\\..\\v1\\expo"),
    "a header of a proxy": request(b"GET /v1/expo", b"X-Original-URL: /health\r\nX-Forwarded-Prefix: /health\r\n"),
    "a route that vLLM leaves open": request(b"POST /invocations", b"Content-Type: application/json\r\n", _ASK),
    "another method by a header": request(b"POST /v1/completions", b"X-HTTP-Method-Override: OPTIONS\r\n", _ASK),
    "a method in small letters": request(b"options /v1/expo"),
    "a method of its own": request(b"FOO /v1/expo"),
    "two keys": request(b"GET /v1/expo", b"Authorization: Bearer x\r\n" + _KEY),
    "a key that is no text": request(b"GET /v1/expo", b"Authorization: Bearer \xff\x00\r\n"),
    "a websocket": request(b"GET /v1/expo", _WEBSOCKET),
    "a preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "in a pipeline": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + request(b"GET /v1/expo"),
}
OTHER_ALPHA = {
    "another": b"X-Expo-Alpha: 0.6\r\n",
    "both": b"X-Expo-Alpha: 0.5\r\nX-Expo-Alpha: 0.6\r\n",
    "a list": b"X-Expo-Alpha: 0.5, 0.5\r\n",
    "nothing": b"X-Expo-Alpha: \r\n",
    "no number": b"x-expo-alpha: \xff\r\n",
    "infinity": b"X-EXPO-ALPHA: 1e999\r\n",
}
WITH_KEY = {
    "bytes that are no text": b'{"model": "\xff"}',
    "a list": b"[]",
    "a key twice": b'{"model": "first", "prompt": "a", "prompt": ["b"], "max_tokens": 1}',
    "a huge number": b'{"model": "first", "prompt": "a", "max_tokens": ' + b"9" * 4000 + b"}",
    "a huge count": b'{"model": "first", "prompt": "a", "n": 1000000000}',
    "a pattern that is none": b'{"model": "first", "prompt": "a", "structured_outputs": {"regex": "("}}',
    "half a surrogate pair": b'{"model": "first", "prompt": "\\ud800", "max_tokens": 1}',
    "deep": b'{"model": "first", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "tokens beyond the vocabulary": b'{"model": "first", "prompt": [4294967296], "max_tokens": 1}',
}
_HIDDEN = b"GET /v1/expo HTTP/1.1\r\nHost: x\r\n\r\n"
SMUGGLED = {
    "a length and chunks": b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + _HIDDEN,
    "two lengths": b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(_HIDDEN) + _HIDDEN,
    "a space before the colon": b"Transfer-Encoding : chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + _HIDDEN,
    "two codings": b"Transfer-Encoding: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + _HIDDEN,
    "a line end in a name": b"X\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + _HIDDEN,
}


def answers_of(server: Server, message: Message) -> list[Answer]:
    """The answers, once none of the promises was found broken."""
    answers = send(server.port, message)
    assert list(problems(message, answers, API_KEY, ALPHA)) == []
    return answers


@pytest.mark.engine
@pytest.mark.parametrize("name", WITHOUT_KEY)
def test_no_spelling_opens_a_route(server: Server, name: str) -> None:
    kind = "upgrade" if name == "a websocket" else "path"
    assert answers_of(server, Message(kind, (WITHOUT_KEY[name],), method="GET", is_whole=True))


@pytest.mark.engine
@pytest.mark.parametrize("name", OTHER_ALPHA)
@pytest.mark.parametrize("path", [b"/health", b"/v1/expo", b"/no-such-route"])
def test_another_alpha_is_never_answered(server: Server, name: str, path: bytes) -> None:
    raw = request(b"GET " + path, _KEY + OTHER_ALPHA[name])
    message = Message("alpha", (raw,), has_key=True, asks_other_alpha=True, method="GET", is_whole=True)
    assert [answer.status for answer in answers_of(server, message)] == [412]


@pytest.mark.engine
@pytest.mark.parametrize("name", WITH_KEY)
def test_odd_body_is_no_error_of_the_server(server: Server, name: str) -> None:
    raw = request(b"POST /v1/completions", _KEY + b"Content-Type: application/json\r\n", WITH_KEY[name])
    answers = answers_of(server, Message("body", (raw,), has_key=True, method="POST", is_whole=True))
    assert answers[0].status in (200, 400)


@pytest.mark.engine
@pytest.mark.parametrize("name", SMUGGLED)
def test_hidden_request_is_not_answered(server: Server, name: str) -> None:
    raw = b"POST /v1/models HTTP/1.1\r\nHost: x\r\n" + _KEY + SMUGGLED[name]
    answers_of(server, Message("smuggled", (raw,), has_key=True, method="POST"))


@pytest.mark.engine
def test_drawn_messages_leave_the_server_as_it_was(server: Server) -> None:
    body = {"model": "first", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    before = server.post("/v1/completions", body).json()["choices"]
    drawer = Drawer(routes(server), API_KEY, random.Random(1))
    kinds = (drawer.path, drawer.alpha, drawer.pipeline, drawer.path, drawer.garbage, drawer.chunks)
    started = time.monotonic()
    for number in range(120):
        message = kinds[number % len(kinds)]()
        assert list(problems(message, send(server.port, message), API_KEY, ALPHA)) == [], message.raw[:500]
        if time.monotonic() - started > 20:
            break
    assert server.post("/v1/completions", body).json()["choices"] == before


def test_answers_that_break_a_promise_are_seen() -> None:
    """Else the tests above would pass whatever the server does."""
    asked = Message("path", (b"GET /v1/models HTTP/1.1\r\n\r\n",), method="GET", is_whole=True)

    def found(status: int, body: bytes, alpha: bytes | None = b"0.5", message: Message = asked) -> list[str]:
        header = b"X-Expo-Alpha: " + alpha + b"\r\n" if alpha is not None else b""
        head = b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n" % (status, len(body))
        return [
            problem.split(":")[0]
            for problem in problems(message, parse(head + header + b"\r\n" + body, "GET"), "key", "0.5")
        ]

    assert found(401, b"{}", None) == found(200, b"") == found(400, b"Invalid HTTP request received.", None) == []
    assert found(200, b"{}") == ["status 200 without the key"]
    assert found(405, b"{}") == ["status 405 without the key"]
    assert found(503, b"", message=Message("body", (b"",), has_key=True)) == ["status 503"]
    assert found(200, b"", b"0.6") == ["X-Expo-Alpha is ['0.6'] with status 200"]
    assert found(200, b"", None) == ["X-Expo-Alpha is None with status 200"]
    other = Message("alpha", (b"",), has_key=True, asks_other_alpha=True)
    assert found(200, b"", message=other) == ["another alpha was asked for, and answered with 200"]
    hidden = Message("smuggled", (b"",), has_key=True)
    assert found(200, b'{"effective_alpha": 1}', message=hidden) == ["a smuggled request was answered"]
    assert found(401, b"my key") == ["the key is in the answer"]
    assert list(problems(asked, [], "key", "0.5")) == ["no answer"]
    two = b"HTTP/1.1 401 X\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n"
    assert [(answer.status, answer.body) for answer in parse(two, "GET")] == [(401, b"{}"), (200, b"a")]
