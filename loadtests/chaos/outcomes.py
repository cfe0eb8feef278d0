"""What a client sees of one request: how it ended, when its tokens came, what they were."""

from __future__ import annotations

import asyncio
import errno
import json
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import aiohttp

# A process that dies resets the connections that it has not accepted yet.
_REFUSALS = (errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH)


class Outcome(StrEnum):
    """How a request ended, as its client sees it."""

    COMPLETE = "complete"
    CUT_WITH_EVENT = "cut with an error event"
    CUT = "cut without a word"
    BUSY = "503 with Retry-After"
    REFUSED = "connection refused"
    CLOSED = "closed before an answer"
    SILENT = "silent beyond the client's limit"
    LEFT = "left by the client"
    UNEXPECTED = "unexpected"


@dataclass(frozen=True)
class Request:
    """One request to a server.

    Args:
        path: ``/v1/completions`` or ``/v1/chat/completions``.
        body: as JSON, without ``stream``.
        is_streamed: whether the answer comes token by token.
        leaves_after: chunks after which the client closes the connection; None for one that stays.
        label: what kind of request it is, for counts.
    """

    path: str
    body: dict[str, Any]
    is_streamed: bool = True
    leaves_after: int | None = None
    label: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the body that is sent; the tokens of a stream are counted by the server, in its last event."""
        streaming = {"stream": True, "stream_options": {"include_usage": True}} if self.is_streamed else {}
        return {**self.body, **streaming}


@dataclass
class Answer:
    """What came of a request; times are CLOCK_MONOTONIC in seconds."""

    began: float
    ended: float = 0.0
    outcome: Outcome = Outcome.UNEXPECTED
    detail: str = ""
    """What was unexpected, or the error event."""
    first_token: float | None = None
    chunks: int = 0
    tokens: int | None = None
    finish_reason: str | None = None
    text: str = field(default="", repr=False)
    label: str = ""
    clients: int = 0
    """How many asked at the same time when it began."""

    @property
    def seconds(self) -> float:
        """From the request to its end."""
        return self.ended - self.began

    @property
    def seconds_per_token(self) -> float | None:
        """Of each token after the first; None where there are fewer than two."""
        if self.first_token is None or not self.tokens or self.tokens < 2:
            return None
        return (self.ended - self.first_token) / (self.tokens - 1)


async def ask(session: aiohttp.ClientSession, url: str, request: Request) -> Answer:
    """Send a request and follow its answer to the end, whatever that is.

    Args:
        session: its timeouts are what the client has patience for.
        url: the server's root.
        request: what is asked.
    """
    answer = Answer(time.monotonic(), label=request.label)
    try:
        async with session.post(url + request.path, json=request.as_json()) as response:
            if response.status != 200:
                answer.outcome, answer.detail = judge_refusal(response.status, response.headers, await response.text())
            elif request.is_streamed:
                await _follow(response, request, answer)
            else:
                _take_whole(await response.json(), request, answer)
    except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
        answer.outcome, answer.detail = judge_failure(error, has_begun=answer.chunks > 0)
    answer.ended = time.monotonic()
    return answer


def judge_refusal(status: int, headers: Any, text: str) -> tuple[Outcome, str]:
    """Return what an answer other than 200 is: a server that is busy says when to come back, in OpenAI's shape."""
    detail = f"{status}: {text[:200]}"
    if status != 503:
        return Outcome.UNEXPECTED, detail
    if not str(headers.get("Retry-After", "")).isdigit():
        return Outcome.UNEXPECTED, f"no Retry-After in {detail}"
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return Outcome.UNEXPECTED, f"no OpenAI error in {detail}"
    return Outcome.BUSY, str(message)


def judge_failure(error: BaseException, *, has_begun: bool) -> tuple[Outcome, str]:
    """Return what an exception of the client means.

    Args:
        error: what aiohttp raised.
        has_begun: whether some of the answer had come.
    """
    detail = f"{type(error).__name__}: {error}"[:200]
    if isinstance(error, aiohttp.ClientConnectorError):
        refused = error.os_error.errno in _REFUSALS
        return Outcome.REFUSED if refused else Outcome.UNEXPECTED, f"{detail} (errno {error.os_error.errno})"
    if isinstance(error, TimeoutError):
        return Outcome.SILENT, detail
    if isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, aiohttp.ClientPayloadError)):
        return Outcome.CUT if has_begun else Outcome.CLOSED, detail
    return Outcome.UNEXPECTED, detail


async def _follow(response: aiohttp.ClientResponse, request: Request, answer: Answer) -> None:
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        event = line.removeprefix(b"data: ").strip()
        if event == b"[DONE]":
            answer.outcome, answer.detail = judge_end(request, answer)
            return
        take_event(json.loads(event), answer)
        if request.leaves_after is not None and answer.chunks >= request.leaves_after:
            answer.outcome = Outcome.LEFT
            response.close()
            return
    # The end without [DONE]: an error event says why, or nothing does.
    answer.outcome = Outcome.CUT_WITH_EVENT if answer.detail else Outcome.CUT


def take_event(event: dict[str, Any], answer: Answer) -> None:
    """Add one event of a stream to its answer."""
    if "error" in event:
        answer.detail = json.dumps(event["error"])[:200]
        return
    if usage := event.get("usage"):
        answer.tokens = usage["completion_tokens"]
    for choice in event.get("choices", []):
        text = choice.get("text") or choice.get("delta", {}).get("content") or ""
        if answer.first_token is None:
            answer.first_token = time.monotonic()
        answer.chunks += 1
        answer.text += text
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason


def judge_end(request: Request, answer: Answer) -> tuple[Outcome, str]:
    """Return what a stream is that ended with ``[DONE]``: it may have said before that it was cut."""
    if answer.detail:
        return Outcome.CUT_WITH_EVENT, answer.detail
    if answer.finish_reason not in ("length", "stop"):
        return Outcome.UNEXPECTED, f"[DONE] with the finish reason {answer.finish_reason!r}"
    asked = request.body.get("max_tokens")
    if request.body.get("ignore_eos") and answer.tokens != asked:
        return Outcome.UNEXPECTED, f"{answer.tokens} tokens instead of {asked}"
    return Outcome.COMPLETE, ""


def _take_whole(body: dict[str, Any], request: Request, answer: Answer) -> None:
    choice = body["choices"][0]
    answer.text = choice.get("text") or choice.get("message", {}).get("content") or ""
    answer.finish_reason, answer.tokens = choice["finish_reason"], body["usage"]["completion_tokens"]
    answer.outcome, answer.detail = judge_end(request, answer)
