"""The drain of an API server: new requests are refused, open ones end in peace or are cut when the time is over.

vLLM's own drain stops its engine first: from then on each new request fails with status 500, while ``/health`` says
that all is well. So the keeper stops vLLM only when this drain is done.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expo_serve.state.shared import Reporter, SharedState
from expo_serve.vllm_plugin import compat
from expo_serve.vllm_plugin.computing import Computing
from expo_serve.vllm_plugin.watchdog import Watchdog

HEALTH_ROUTES = frozenset({"/health", "/ping", "/v1/expo"})
"""What says whether requests should be sent; the last is what the probe asks."""
UNCOUNTED_ROUTES = frozenset({"/version", "/metrics", "/metrics/", *HEALTH_ROUTES})
"""They are no work: they neither hold up a drain nor are they cut."""
_OVER = "the server stops, and the time for open requests is over"
_EVENTS = "text/event-stream"
_INTERNAL_ERROR = 500
_RETRY_SECONDS = "1"
"""Another server behind the same address may answer at once."""
_TRY_AGAIN_LATER = 1013  # IANA's registry of WebSocket close codes
_POLICY_VIOLATION = 1008  # RFC 6455, section 7.4.1
_TICK_SECONDS = 0.1
_REPORT_SECONDS = 1.0
_SLOW_CLIENT_SECONDS = 2.0
_UNREAD_SECONDS = 1
"""After all requests have been answered or cut: for clients to read the rest."""


class OpenRequest:
    """A request that is being answered, and what has been sent of the answer.

    Args:
        scope: its scope.
        receive: its messages.
        send: takes the answer's messages.
        gate: knows whether the engine is dead.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, gate: Gate) -> None:
        self.is_cut = False
        self._scope, self._receive, self._send = scope, receive, send
        self._gate = gate
        self._task = asyncio.current_task()
        self._has_started = self._is_stream = self._is_replaced = False

    async def send(self, message: Message) -> None:
        """Send a message of the answer; that of a dead engine is replaced, since another server may answer."""
        if message["type"] in ("http.response.start", "websocket.accept"):
            self._has_started = True
            self._is_stream = Headers(raw=message.get("headers", [])).get("content-type", "").startswith(_EVENTS)
            if message.get("status") == _INTERNAL_ERROR and self._gate.has_died:
                self._is_replaced = True
                await refuse(self._scope, self._receive, self._send, "the engine has ended, and so does the server")
        if not self._is_replaced:
            await self._send(message)

    def cut(self) -> None:
        """Stop to work on it."""
        if not self.is_cut and self._task is not None:
            self.is_cut = True
            self._task.cancel()

    async def end(self) -> None:
        """Tell the client that the answer is cut, and end it.

        Raises:
            CancelledError: the answer is in the middle of something that is no stream of events, so that only the
                connection's end can tell.
        """
        if self._scope["type"] == "websocket" or not self._has_started:
            await refuse(self._scope, self._receive, self._send, _OVER)
        elif self._is_stream:
            event = error_body(f"{_OVER}: this answer is cut", 503)
            body = b"data: " + json.dumps(event).encode() + b"\n\n"
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
        else:
            raise asyncio.CancelledError


class Gate:
    """Whether requests are let in, and those that are open.

    Args:
        state: the command's shared memory; None under plain vLLM, where nothing ever drains.
    """

    def __init__(self, state: SharedState | None) -> None:
        self._state = state
        self.reporter = state.reporter("api") if state else Reporter(None, None, {})
        """Of this API server."""
        self.open: set[OpenRequest] = set()
        self._cut = 0
        self._reported = 0.0
        self._watchdog: Watchdog | None = None
        self._engine_client: Any = None
        self._app_state: Any = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused."""
        return self._state is not None and self._state.draining > 0

    @property
    def is_hung(self) -> bool:
        """Whether the engine has not answered for too long."""
        return self._watchdog is not None and self._watchdog.is_hung

    @property
    def has_died(self) -> bool:
        """Whether vLLM knows that its engine is dead: the server will end."""
        return bool(getattr(self._engine_client, "errored", False))

    def watch(self, engine_client: Any, app_state: Any) -> None:
        """Follow the drain and the engines from now on; called in the event loop.

        Args:
            engine_client: vLLM's client of the engines.
            app_state: of the application; vLLM puts uvicorn's server there.
        """
        self._engine_client, self._app_state = engine_client, app_state
        if self._state is not None:
            look = Computing(self._state).look if compat.current_platform.is_cpu() else None
            self._watchdog = Watchdog(engine_client, self._state.engine_timeout, self.reporter, look)
            self._tasks = [asyncio.create_task(work) for work in (self._follow(self._state), self._watchdog.run())]

    async def _follow(self, state: SharedState) -> None:
        """Report, and cut what is open when it is time to."""
        while True:
            if self.is_draining:
                self._bound_shutdown()
            if state.cutting:
                self._cut_all()
            now = time.monotonic()
            if self.is_draining or now - self._reported >= _REPORT_SECONDS:
                self._reported = now
                self.reporter.update(open=len(self.open), cut=self._cut, reported=now)
            await asyncio.sleep(_TICK_SECONDS)

    def _bound_shutdown(self) -> None:
        """Let uvicorn end although a client does not read: the answer that is left in its buffers is given up."""
        if (server := getattr(self._app_state, "server", None)) is not None:
            server.config.timeout_graceful_shutdown = _UNREAD_SECONDS

    def _cut_all(self) -> None:
        for request in self.open:
            self._cut += not request.is_cut
            request.cut()


class DrainMiddleware:
    """Refuses requests while the server drains, and says no for health while the engine hangs.

    Args:
        app: what is served.
        gate: decides.
    """

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self.app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] == "websocket" and path in UNCOUNTED_ROUTES:
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})  # none of them speaks it; some assert
        elif reason := self._refusal(path):
            await _read_body(scope, receive)
            await refuse(scope, receive, send, reason)
        elif path in UNCOUNTED_ROUTES:
            await self.app(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    def _refusal(self, path: str) -> str | None:
        if self._gate.is_draining and (path in HEALTH_ROUTES or path not in UNCOUNTED_ROUTES):
            return "the server is stopping and takes no new requests"
        if self._gate.has_died and (path in HEALTH_ROUTES or path not in UNCOUNTED_ROUTES):
            return "the engine has ended, and so does the server"
        if path in HEALTH_ROUTES and self._gate.is_hung:
            return "the engine does not answer"
        return None

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = OpenRequest(scope, receive, send, self._gate)
        self._gate.open.add(request)
        try:
            await self.app(scope, receive, request.send)
        except asyncio.CancelledError:
            if not request.is_cut:
                raise
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            with suppress(TimeoutError):
                await asyncio.wait_for(request.end(), _SLOW_CLIENT_SECONDS)
        finally:
            self._gate.open.discard(request)


async def _read_body(scope: Scope, receive: Receive) -> None:
    """Read what a client sends: if the connection were closed before, it would see a reset instead of an answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_SLOW_CLIENT_SECONDS):
            while scope["type"] == "http" and (await receive()).get("more_body", False):
                pass


def error_body(message: str, code: int) -> dict[str, Any]:
    """Return an error in the shape of OpenAI's API."""
    return {"error": {"message": message, "type": "service_unavailable_error", "param": None, "code": code}}


async def refuse(scope: Scope, receive: Receive, send: Send, message: str) -> None:
    """Answer with status 503, so that a client tries again elsewhere."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": _TRY_AGAIN_LATER, "reason": message})
        return
    headers = {"Retry-After": _RETRY_SECONDS, "Connection": "close"}
    await JSONResponse(error_body(message, 503), status_code=503, headers=headers)(scope, receive, send)
