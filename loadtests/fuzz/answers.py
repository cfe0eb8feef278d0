"""What came back over a connection, and which promises it breaks."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse, IncompleteRead
from typing import Any
from urllib.parse import unquote, urlsplit

from expo_serve.vllm_plugin.endpoints import OPEN_ROUTES
from loadtests.fuzz.messages import Message

_HEADER = "X-Expo-Alpha"
_PARSERS_OWN = b"Invalid HTTP request received."
_SECRET = b'"effective_alpha"'
"""Is in the answer of /v1/expo alone."""
_WITHOUT_HEADER = (401, 500)
"""docs/observability.md: what did not pass authentication, and errors that nothing handles."""
_HANDSHAKES = (101, 400, 403, 426)
"""Answers to an upgrade that no application gives."""


@dataclass(frozen=True)
class Answer:
    """One response."""

    status: int
    headers: dict[str, list[str]]
    """By lower-case names."""
    body: bytes

    @property
    def is_parsers(self) -> bool:
        """Whether the HTTP parser refused the request, which the application never saw."""
        return self.status == 400 and self.body in (_PARSERS_OWN, b"")


class _Socket:
    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream

    def makefile(self, *_: Any, **__: Any) -> io.BufferedReader:
        return self._stream


class _Unclosed(io.BufferedReader):
    """The stream goes on behind a response."""

    def close(self) -> None:
        pass


def parse(raw: bytes, method: str) -> list[Answer]:
    """Return the responses that came.

    Args:
        raw: all that was received.
        method: of the request that the first one answers.
    """
    stream = _Unclosed(io.BytesIO(raw))
    return list(_responses(stream, method))


def _responses(stream: io.BufferedReader, method: str) -> Iterator[Answer]:
    while stream.peek(1):
        response = HTTPResponse(_Socket(stream), method=method)  # type: ignore[arg-type]  # only makefile is used
        try:
            response.begin()
            body = response.read()
        except IncompleteRead as error:  # the client closed first, or the server did
            body = error.partial
        except HTTPException:
            return
        headers: dict[str, list[str]] = {}
        for name, value in response.getheaders():
            headers.setdefault(name.lower(), []).append(value)
        yield Answer(response.status, headers, body)
        method = ""


def problems(message: Message, answers: list[Answer], key: str, alpha: str) -> Iterator[str]:
    """Yield the promises that the answers to a message break.

    Args:
        message: what was sent.
        answers: what came.
        key: the API key, which no answer may hold.
        alpha: the served alpha.
    """
    if message.is_whole and not answers:
        yield "no answer"
    for answer in answers:
        is_handshake = message.kind == "upgrade" and answer.status in _HANDSHAKES
        if answer.status >= 500:
            yield f"status {answer.status}"
        is_apps = not answer.is_parsers and not is_handshake and answer.status not in _WITHOUT_HEADER
        if is_apps and answer.headers.get(_HEADER.lower()) != [alpha]:
            yield f"{_HEADER} is {answer.headers.get(_HEADER.lower())} with status {answer.status}"
        if message.asks_other_alpha and answer.status < 300:
            yield f"another alpha was asked for, and answered with {answer.status}"
        if not message.has_key and not _is_closed(message, answer, is_handshake):
            yield f"status {answer.status} without the key: {answer.body[:80]!r}"
        if message.kind == "smuggled" and _SECRET in answer.body:
            yield "a smuggled request was answered"
        if key.encode() in answer.body:
            yield "the key is in the answer"


def _is_closed(message: Message, answer: Answer, is_handshake: bool) -> bool:
    """Return whether an answer without the key tells nothing: 401, an open route, or a preflight, which has no key."""
    if answer.status in (401, 412) or answer.is_parsers or (is_handshake and answer.status != 101):
        return True
    if _is_preflight(message):
        return answer.status in (200, 307, 400, 404, 405)
    if answer.status in (307, 405):
        return _path(message) in OPEN_ROUTES
    return answer.status == 200 and _is_open(answer)


def _path(message: Message) -> str:
    """Return the path that the application sees of the first request."""
    target = message.raw.partition(b"\r\n")[0].split(b" ")[1:2] or [b""]
    text = target[0].decode("latin-1")
    return unquote(urlsplit(text).path if "://" in text else text.partition("?")[0].partition("#")[0])


def _is_preflight(message: Message) -> bool:
    return message.raw.startswith(b"OPTIONS ")


def _is_open(answer: Answer) -> bool:
    """Recognise the answers of /health, /ping, /version and /metrics."""
    is_version = answer.body.startswith(b'{"version":') and len(answer.body) < 100
    is_metrics = answer.body.startswith((b"# HELP", b"# TYPE"))
    return not answer.body or is_version or is_metrics
