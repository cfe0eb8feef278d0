"""What the clients of the chaos suite and of the soak make of a server's answers."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from loadtests.chaos.outcomes import Answer, Outcome, Request, ask
from loadtests.chaos.run import refused_at_the_end
from loadtests.chaos.streams import Streams, steady
from loadtests.chaos.traffic import LEVELS, mixed

PATIENCE = aiohttp.ClientTimeout(total=None, sock_connect=2, sock_read=0.5)


def chunk(text: str, finish_reason: str | None = None) -> bytes:
    """One event of a completion's stream."""
    return event({"choices": [{"text": text, "finish_reason": finish_reason}]})


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


ERROR = {"error": {"message": "the server stops", "code": 503}}
USAGE = event({"choices": [], "usage": {"completion_tokens": 2}})
BEGUN = [chunk("a"), chunk("b", "length")]
DONE = b"data: [DONE]\n\n"
STREAMS: dict[str, tuple[list[bytes], Outcome]] = {
    "whole": ([*BEGUN, USAGE, DONE], Outcome.COMPLETE),
    "cut with an event": ([chunk("a"), event(ERROR)], Outcome.CUT_WITH_EVENT),
    "cut with an event and done": ([chunk("a"), event(ERROR), DONE], Outcome.CUT_WITH_EVENT),
    "cut": ([chunk("a")], Outcome.CUT),
    "too short": ([*BEGUN, event({"choices": [], "usage": {"completion_tokens": 1}}), DONE], Outcome.UNEXPECTED),
    "without a reason": ([chunk("a"), USAGE, DONE], Outcome.UNEXPECTED),
    "no JSON": ([b"data: {\n\n"], Outcome.UNEXPECTED),
}  # fmt: skip


@asynccontextmanager
async def serving(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """A server for clients to talk to; gives its root."""
    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def asked(handler: Callable[[web.Request], Awaitable[web.StreamResponse]], **more: Any) -> Answer:
    """What a client makes of a server's answer."""

    async def talk() -> Answer:
        async with serving(handler) as url, aiohttp.ClientSession(timeout=PATIENCE) as session:
            return await ask(session, url, Request("/v1/completions", {"max_tokens": 2, "ignore_eos": True}, **more))

    return asyncio.run(talk())


def streaming(parts: list[bytes], wait: float = 0.0) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for part in parts:
            await response.write(part)
        await asyncio.sleep(wait)
        return response

    return answer


@pytest.mark.parametrize(("parts", "outcome"), STREAMS.values(), ids=STREAMS)
def test_end_of_a_stream(parts: list[bytes], outcome: Outcome) -> None:
    answer = asked(streaming(parts))
    assert answer.outcome is outcome, answer.detail


def test_stream_is_timed_and_counted() -> None:
    answer = asked(streaming([*BEGUN, USAGE, DONE]))
    assert (answer.text, answer.tokens, answer.chunks) == ("ab", 2, 2)
    assert answer.first_token is not None
    assert answer.began < answer.first_token <= answer.ended
    assert answer.seconds_per_token is not None


def test_client_that_leaves_and_one_that_waits_in_vain() -> None:
    assert asked(streaming(BEGUN, wait=60), leaves_after=1).outcome is Outcome.LEFT
    assert asked(streaming(BEGUN, wait=60)).outcome is Outcome.SILENT


def test_connection_that_breaks_in_the_middle_and_before() -> None:
    async def break_off(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        if "stream" in await request.json():
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(chunk("a"))
            await asyncio.sleep(0.1)
        request.transport.abort()
        return web.Response()

    assert asked(break_off).outcome is Outcome.CUT
    assert asked(break_off, is_streamed=False).outcome is Outcome.CLOSED


@pytest.mark.parametrize(("status", "headers", "body", "outcome"), [
    (503, {"Retry-After": "1"}, ERROR, Outcome.BUSY),
    (503, {}, ERROR, Outcome.UNEXPECTED),
    (503, {"Retry-After": "1"}, {"detail": "busy"}, Outcome.UNEXPECTED),
    (500, {"Retry-After": "1"}, ERROR, Outcome.UNEXPECTED),
])  # fmt: skip
def test_refusal(status: int, headers: dict[str, str], body: dict[str, Any], outcome: Outcome) -> None:
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status, headers=headers)

    assert asked(refuse).outcome is outcome


def test_whole_answer() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        assert "stream" not in await request.json()
        choice = {"message": {"content": "ab"}, "finish_reason": "length"}
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": 2}})

    found = asked(answer, is_streamed=False)
    assert (found.outcome, found.text, found.seconds_per_token) == (Outcome.COMPLETE, "ab", None)


def test_nobody_listens() -> None:
    async def talk() -> Answer:
        async with serving(streaming([])) as url:
            pass
        async with aiohttp.ClientSession(timeout=PATIENCE) as session:
            return await ask(session, url, Request("/", {}))

    assert asyncio.run(talk()).outcome is Outcome.REFUSED


def test_clients_ask_while_they_are_let() -> None:
    async def watch() -> None:
        async with serving(streaming([*BEGUN, USAGE, DONE])) as url:
            await asyncio.to_thread(drive, url)

    def drive(url: str) -> None:
        with Streams(url, [lambda _: Request("/", {"max_tokens": 2})] * 5, seed=1) as streams:
            time.sleep(0.3)
            assert streams.answers == []
            streams.go_on(2)
            while len(streams.answers) < 10:
                time.sleep(0.01)
            assert streams.pause()
            count = len(streams.answers)
            time.sleep(0.3)
            assert len(streams.answers) == count
            assert streams.ended_since(time.monotonic()) == []
        assert {answer.clients for answer in streams.answers} == {2}
        assert streams.crashes == []

    asyncio.run(watch())


def test_connections_that_a_closing_port_resets_are_refused() -> None:
    early, late = Answer(0, 5, Outcome.CLOSED), Answer(8, 9.5, Outcome.CLOSED)
    found = refused_at_the_end([early, late, Answer(10, 10, Outcome.REFUSED), Answer(0, 11, Outcome.CUT)])
    assert [answer.outcome for answer in found] == [Outcome.CLOSED, Outcome.REFUSED, Outcome.REFUSED, Outcome.CUT]
    assert refused_at_the_end([early, late]) == [early, late]


def test_traffic_is_mixed() -> None:
    chance = random.Random(1)
    requests = [mixed(["m", "adapter"])[0](chance) for _ in range(500)]
    assert {request.body["model"] for request in requests} == {"m", "adapter"}
    assert {request.path for request in requests} == {"/v1/completions", "/v1/chat/completions"}
    assert 20 < sum(request.leaves_after is not None for request in requests) < 200
    assert len({request.label for request in requests}) == 16
    assert len(mixed(["m"])) == max(LEVELS) == 128
    assert steady("m", 3)[0](chance).body["max_tokens"] < 10
