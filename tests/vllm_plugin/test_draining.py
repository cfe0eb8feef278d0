"""The drain of an API server and the watchdog of its engine; an app that streams stands for vLLM's."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, MutableMapping
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from expo_serve.state.shared import SharedState
from expo_serve.vllm_plugin.draining import DrainMiddleware, Gate
from expo_serve.vllm_plugin.watchdog import Watchdog

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """The event loop's library, of anyio's plugin for pytest."""
    return "asyncio"


@pytest.fixture
def state() -> Iterator[SharedState]:
    """A command's shared memory."""
    state = SharedState.create()
    yield state
    state.close()


class App:
    """Routes that answer when they are told to, behind the middleware."""

    def __init__(self, state: SharedState | None) -> None:
        self.go_on = asyncio.Event()
        self.state = SimpleNamespace()
        self.gate = Gate(state)
        self.ended: list[str] = []
        inner = Starlette(
            routes=[
                Route("/stream", self._stream),
                Route("/file", self._file),
                Route("/late", self._late),
                Route("/broken", self._broken),
                Route("/health", self._health),
                Route("/metrics", self._health),
                WebSocketRoute("/talk", self._talk),
            ]
        )
        self.app = DrainMiddleware(inner, self.gate)

    async def _events(self) -> Any:
        try:
            yield b"data: one\n\n"
            await self.go_on.wait()
            yield b"data: two\n\n"
        finally:
            self.ended.append("stream")

    async def _stream(self, request: Request) -> StreamingResponse:
        return StreamingResponse(self._events(), media_type="text/event-stream; charset=utf-8")

    async def _file(self, request: Request) -> StreamingResponse:
        return StreamingResponse(self._events(), media_type="audio/wav")

    async def _late(self, request: Request) -> JSONResponse:
        await self.go_on.wait()
        return JSONResponse({"answer": 1})

    async def _broken(self, request: Request) -> JSONResponse:
        await self.go_on.wait()
        return JSONResponse({"error": {"message": "EngineCore encountered an issue", "code": 500}}, 500)

    async def _health(self, request: Request) -> JSONResponse:
        return JSONResponse({})

    async def _talk(self, socket: WebSocket) -> None:
        await socket.accept()
        await socket.receive_text()

    def ask(self, path: str, chunks: int = 1) -> Asked:
        """Begin a request."""
        return Asked(self.app, path, chunks)


class Asked:
    """A request of a client that stays until the end."""

    def __init__(self, app: Any, path: str, chunks: int = 1) -> None:
        self.messages: list[dict[str, Any]] = []
        self.chunks = chunks
        """Of its body, which are still to be read."""
        self._stay = asyncio.Event()
        scope: dict[str, Any] = {
            "type": "http",
            "method": "GET",
            "path": path,
            "headers": [],
            "query_string": b"",
            "root_path": "",
        }
        scope |= {"asgi": {"version": "3.0", "spec_version": "2.4"}}
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self.chunks:
            self.chunks -= 1
            return {"type": "http.request", "body": b"{}", "more_body": self.chunks > 0}
        await self._stay.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        """Status of the answer."""
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        """What has come so far."""
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def is_whole(self) -> bool:
        """Whether the answer has ended as it should."""
        return self.messages[-1]["type"] == "http.response.body" and not self.messages[-1].get("more_body")


async def settle() -> None:
    """Let everything that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


async def watched(app: App) -> None:
    """Have the gate followed, beside an engine that always answers."""
    core = SimpleNamespace(call_utility_async=_answer)
    config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))
    app.gate.watch(SimpleNamespace(engine_core=core, vllm_config=config), app.state)


async def _answer(*_: object) -> list[bool]:
    return [True]


async def test_new_requests_are_refused_and_open_ones_end(state: SharedState) -> None:
    app = App(state)
    stream, late = app.ask("/stream"), app.ask("/late")
    await settle()
    assert len(app.gate.open) == 2
    state.draining = time.monotonic()
    for path, status in (("/stream", 503), ("/nowhere", 503), ("/health", 503), ("/v1/expo", 503), ("/metrics", 200)):
        asked = app.ask(path)
        await asked.task
        assert asked.status == status, path
        if status == 503:
            assert asked.headers["retry-after"] == "1"
            assert asked.headers["connection"] == "close"
            assert json.loads(asked.body)["error"].keys() == {"message", "type", "param", "code"}
    app.go_on.set()
    await asyncio.gather(stream.task, late.task)
    assert stream.body == b"data: one\n\ndata: two\n\n"
    assert json.loads(late.body) == {"answer": 1}
    assert not app.gate.open


async def test_body_of_a_refused_request_is_read(state: SharedState) -> None:
    """The end of a connection with unread bytes in it resets it: the client would not see the answer."""
    app = App(state)
    state.draining = time.monotonic()
    asked = app.ask("/stream", chunks=1000)
    await asked.task
    assert (asked.status, asked.chunks) == (503, 0)


async def test_client_that_sends_no_end_is_refused_too(state: SharedState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expo_serve.vllm_plugin.draining._SLOW_CLIENT_SECONDS", 0.1)
    app = App(state)
    state.draining = time.monotonic()
    asked = app.ask("/stream", chunks=0)
    await asyncio.wait_for(asked.task, 5)
    assert asked.status == 503


async def test_open_requests_are_cut_and_told_so(state: SharedState) -> None:
    app = App(state)
    await watched(app)
    stream, late, file = app.ask("/stream"), app.ask("/late"), app.ask("/file")
    await settle()
    state.draining = state.cutting = time.monotonic()
    await asyncio.wait([stream.task, late.task, file.task], timeout=5)
    first, event = stream.body.split(b"\n\n", 1)
    assert first == b"data: one"
    assert "cut" in json.loads(event.removeprefix(b"data: "))["error"]["message"]
    assert stream.is_whole
    assert late.status == 503
    assert "retry-after" in late.headers
    assert file.task.cancelled()  # the server closes the connection, so that the client sees that the file is cut
    assert not file.is_whole
    assert app.ended == ["stream", "stream"]
    await asyncio.sleep(0.3)
    (report,) = state.reports("api")
    assert (report["open"], report["cut"]) == (0, 3)
    assert report["reported"] > state.cutting


async def test_client_that_does_not_read_holds_nothing_up(state: SharedState) -> None:
    app = App(state)
    await watched(app)
    asked = app.ask("/stream")
    await settle()

    async def never(message: MutableMapping[str, Any]) -> None:
        await asyncio.Event().wait()

    (request,) = app.gate.open
    request._send = never
    state.draining = state.cutting = began = time.monotonic()
    await asyncio.wait([asked.task], timeout=10)
    assert asked.task.done()
    assert time.monotonic() - began < 4


async def test_client_that_goes_away_is_not_cut(state: SharedState) -> None:
    app = App(state)
    asked = app.ask("/stream")
    await settle()
    asked.task.cancel()
    await settle()
    assert asked.task.cancelled()
    assert not app.gate.open
    assert len(asked.messages) == 2


def test_websockets_drain_too(state: SharedState) -> None:
    app = App(state)
    client = TestClient(app.app)
    with client.websocket_connect("/talk") as socket:
        assert len(app.gate.open) == 1
        socket.send_text("x")
    state.draining = 1.0
    with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect("/talk"):
        pass
    assert closed.value.code == 1013


@pytest.mark.parametrize("path", ["/metrics", "/health", "/v1/expo"])
def test_routes_of_http_only_refuse_a_websocket(state: SharedState, path: str) -> None:
    client = TestClient(App(state).app)
    with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect(path):
        pass
    assert closed.value.code == 1008


def test_without_shared_memory_nothing_drains() -> None:
    app = App(None)
    assert TestClient(app.app).get("/health").status_code == 200
    assert not app.gate.is_draining
    assert not app.gate.is_hung


class Engines:
    """vLLM's client, of engines that can be stopped."""

    def __init__(self) -> None:
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.asked: list[str] = []
        self.fails = self.errored = False
        self.engine_core = SimpleNamespace(call_utility_async=self._call)
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))

    async def _call(self, utility: str, *arguments: Any) -> Any:
        self.asked.append(utility)
        if self.fails:
            raise RuntimeError("of this test")
        await self.goes_on.wait()
        return [True]


def app_says_hung(watchdog: Watchdog) -> bool:
    """Asked anew, which mypy does not expect of a property."""
    return watchdog.is_hung


async def test_watchdog_notices_and_forgets(state: SharedState) -> None:
    engines = Engines()
    watchdog = Watchdog(engines, 0.4, state.reporter("api"))
    task = asyncio.create_task(watchdog.run())
    await asyncio.sleep(0.7)
    assert not watchdog.is_hung
    assert engines.asked[:2] == ["is_sleeping", "collective_rpc"]
    engines.goes_on.clear()
    await asyncio.sleep(0.7)
    assert watchdog.silent_seconds > 0.4
    assert app_says_hung(watchdog)
    (report,) = state.reports("api")
    assert time.monotonic() - report["answered"] > 0.4
    count = len(engines.asked)
    await asyncio.sleep(0.3)
    assert len(engines.asked) == count  # one question at a time
    engines.goes_on.set()
    await settle()
    assert not watchdog.is_hung
    task.cancel()


async def test_engines_that_compute_are_not_hung(state: SharedState) -> None:
    engines, computing = Engines(), [True]
    watchdog = Watchdog(engines, 0.4, state.reporter("api"), lambda asked: computing[0] and asked < time.monotonic())
    engines.goes_on.clear()
    task = asyncio.create_task(watchdog.run())
    await asyncio.sleep(0.9)
    assert not watchdog.is_hung
    computing[0] = False
    await asyncio.sleep(0.6)
    assert app_says_hung(watchdog)
    assert engines.asked == ["is_sleeping"]
    task.cancel()


async def test_watchdog_that_is_off_asks_nothing(state: SharedState) -> None:
    engines = Engines()
    watchdog = Watchdog(engines, 0.0, state.reporter("api"))
    await watchdog.run()
    assert engines.asked == []
    assert not watchdog.is_hung


async def test_watchdog_leaves_a_dead_engine_to_vllm(state: SharedState) -> None:
    engines = Engines()

    async def dead(*_: object) -> None:
        raise RuntimeError("EngineCore encountered an issue")

    engines.engine_core, engines.errored = SimpleNamespace(call_utility_async=dead), True
    await asyncio.wait_for(Watchdog(engines, 5.0, state.reporter("api")).run(), 1)


async def test_watchdog_goes_on_after_a_question_that_fails(state: SharedState) -> None:
    engines = Engines()
    engines.fails = True
    watchdog = Watchdog(engines, 0.4, state.reporter("api"))
    task = asyncio.create_task(watchdog.run())
    await asyncio.sleep(0.7)
    assert app_says_hung(watchdog)
    engines.fails = False
    await asyncio.sleep(0.3)
    assert not app_says_hung(watchdog)
    task.cancel()


async def test_answer_that_nobody_reads_does_not_hold_uvicorn_up(state: SharedState) -> None:
    """It waits for its connections without end, unless it is told otherwise."""
    app = App(state)
    app.state.server = SimpleNamespace(config=SimpleNamespace(timeout_graceful_shutdown=None))
    await watched(app)
    await asyncio.sleep(0.2)
    assert app.state.server.config.timeout_graceful_shutdown is None
    state.draining = time.monotonic()
    await asyncio.sleep(0.3)
    assert app.state.server.config.timeout_graceful_shutdown == 1


async def test_dead_engine_asks_to_try_elsewhere(state: SharedState) -> None:
    app = App(state)
    await watched(app)
    late, stream, broken = app.ask("/late"), app.ask("/stream"), app.ask("/broken")
    await settle()
    app.gate._engine_client.errored = True
    app.go_on.set()
    asked, probed = app.ask("/late"), app.ask("/v1/expo")
    await asyncio.wait([late.task, stream.task, broken.task, asked.task, probed.task], timeout=5)
    assert [request.status for request in (late, stream, broken, asked, probed)] == [200, 200, 503, 503, 503]
    assert json.loads(broken.body)["error"]["code"] == 503
    assert broken.headers["retry-after"] == "1"


async def test_hung_engine_makes_health_say_no(state: SharedState) -> None:
    app = App(state)
    engines = Engines()
    engines.goes_on.clear()
    state.engine_timeout = 0.2
    app.gate.watch(engines, app.state)
    await asyncio.sleep(0.3)
    for path, status in (("/health", 503), ("/metrics", 200), ("/late", None)):
        asked = app.ask(path)
        await settle()
        assert (asked.status if asked.messages else None) == status
        asked.task.cancel()
