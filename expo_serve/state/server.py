"""The status port: the state of a command over HTTP, from its first second.

It runs as a process of its own (``python -m expo_serve.state.server``), which imports neither torch nor vLLM and ends
with the command. Its arguments are the descriptors of the listening socket and of the shared memory; its standard input
is a pipe that ends with the command.

One thread answers all connections: where all cores are busy, each thread that is woken for an answer waits for its
turn, and a probe waits for all of them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

import h11

from expo_serve.state.routes import METRICS, Answer, answer, refusal
from expo_serve.state.shared import SharedState
from expo_serve.state.snapshot import Words, snapshot

_MAX_CONNECTIONS = 64
_MAX_REQUEST_BYTES = 16 << 10
"""Of its first line and its headers."""
_READ_BYTES = 1 << 10
_TOO_MANY_SPACES = b" " * 256
"""h11's time for a header grows with the square of the spaces before its value."""
_PATIENCE_SECONDS = 20.0
"""How long a client may take for its request, and to take its answer."""


class StatusServer:
    """Answers on a socket that listens already; beyond a bound of connections the oldest is closed.

    Args:
        listener: the socket.
        state: what is shown.
    """

    def __init__(self, listener: socket.socket, state: SharedState) -> None:
        self._listener = listener
        self._state = state
        self._reporter = state.reporter("status")
        self._open: dict[asyncio.StreamWriter, None] = {}
        """The connections, the oldest first."""

    async def serve(self) -> None:
        """Answer until the task is cancelled; no connection stays open then."""
        server = await asyncio.start_server(self._handle, sock=self._listener, limit=_READ_BYTES)
        try:
            await asyncio.get_running_loop().create_future()
        finally:  # not ``async with``: since Python 3.12 that waits for the clients to close their connections
            server.close()
            for writer in self._open:
                writer.transport.abort()

    def snapshot(self) -> Mapping[str, Any]:
        """Return the state now."""
        words = Words(self._state.draining, self._state.engine_timeout)
        return snapshot(self._state.reports(), words, time.monotonic())

    def note_scrape(self, when: float) -> None:
        """Note that the metrics of a time have been read, for which the end of a failed start waits."""
        self._reporter.update(scraped=when)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle a connection; a client that goes away, or is too slow, is no event."""
        self._keep(writer)
        end = writer.transport.abort
        try:
            with suppress(OSError, asyncio.CancelledError):  # TimeoutError too; cancelled at the end of all
                await _Connection(self, reader, writer).answer_all()
                end = writer.close
        finally:
            self._open.pop(writer, None)
            end()

    def _keep(self, writer: asyncio.StreamWriter) -> None:
        """Take in a connection; the oldest of too many has to go."""
        writer.transport.set_write_buffer_limits(high=0)  # what is drained is in the kernel
        self._open[writer] = None
        if len(self._open) > _MAX_CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.transport.abort()


class _Connection:
    """The requests of one connection, and their answers."""

    def __init__(self, server: StatusServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server, self._reader, self._writer = server, reader, writer
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_REQUEST_BYTES)

    async def answer_all(self) -> None:
        """Answer until a side closes the connection; this one does so after a body, which nobody here reads.

        Raises:
            OSError: the client went away, or was too slow (TimeoutError).
        """
        try:
            while isinstance(request := await self._wait_for_event(), h11.Request):
                has_body = not isinstance(self._next_event(), h11.EndOfMessage)
                await self._answer(request, is_last=has_body)
                if self._http.our_state is not h11.DONE:
                    return
                self._http.start_next_cycle()
                await asyncio.sleep(0)  # whoever sends many requests at once waits for those of others
        except h11.RemoteProtocolError as error:
            if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                await self._send(refusal(error.error_status_hint))

    async def _wait_for_event(self) -> Any:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while (event := self._next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self._reader.read(_READ_BYTES))
        return event

    def _next_event(self) -> Any:
        data, _ = self._http.trailing_data
        if _TOO_MANY_SPACES in data.replace(b"\t", b" "):
            raise h11.RemoteProtocolError("too many spaces", error_status_hint=HTTPStatus.BAD_REQUEST)
        return self._http.next_event()

    async def _answer(self, request: h11.Request, *, is_last: bool) -> None:
        began = time.monotonic()
        method, path = request.method.decode(), request.target.decode().partition("?")[0]
        answered = answer(method, path, self._server.snapshot)
        await self._send(answered, with_body=method != "HEAD", is_last=is_last)
        if (method, path) == ("GET", METRICS):
            self._server.note_scrape(began)

    async def _send(self, given: Answer, *, with_body: bool = True, is_last: bool = True) -> None:
        headers = [
            ("Server", "expo-serve"),
            ("Date", formatdate(usegmt=True)),
            ("Content-Type", given.content_type),
            ("Content-Length", str(len(given.body))),
            ("Cache-Control", "no-store"),
            *([("Connection", "close")] if is_last else []),
            *given.headers,
        ]
        response = h11.Response(status_code=given.status, headers=headers, reason=given.status.phrase)
        events = [response, *([h11.Data(given.body)] if with_body else []), h11.EndOfMessage()]
        self._writer.write(b"".join(self._http.send(event) or b"" for event in events))
        async with asyncio.timeout(_PATIENCE_SECONDS):
            await self._writer.drain()
        if self._writer.transport.is_closing():  # closed for a newer one: no error for those who wait
            raise ConnectionAbortedError


async def _serve_until_end(server: StatusServer, pipe: int) -> None:
    """Serve until nobody has the other end of a pipe."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.set_exception_handler(lambda *_: None)  # nobody reads what this process says
    loop.add_reader(pipe, lambda: None if os.read(pipe, 1) else ended.set())
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(server.serve())
        await ended.wait()
        loop.remove_reader(pipe)
        serving.cancel()


def main(listener: int, memory: int) -> int:
    """Serve until standard input ends; returns 0.

    Args:
        listener: descriptor of the listening socket.
        memory: descriptor of the shared memory.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # those of a whole process group: the command's end ends this
    logging.getLogger("asyncio").disabled = True
    server = StatusServer(socket.socket(fileno=listener), SharedState(memory))
    asyncio.run(_serve_until_end(server, 0))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
