"""The status port: the state of a command over HTTP, from its first second.

It runs as a process of its own (``python -m expo_serve.state.server``), which imports neither torch nor vLLM and ends
with the command. Its arguments are the descriptors of the listening socket and of the shared memory; its standard input
is a pipe that ends with the command.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import LineTooLong
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from expo_serve.state.exposition import exposition
from expo_serve.state.shared import SharedState
from expo_serve.state.snapshot import Words, snapshot

_MAX_CONNECTIONS = 64
_MAX_REQUEST_BYTES = 16 << 10
"""Of its first line and its headers."""
_JSON = "application/json"
_TEXT = "text/plain; version=1.0.0; charset=utf-8"

Answer = tuple[int, str, bytes]


class StatusServer(ThreadingHTTPServer):
    """Answers on a socket that listens already; beyond a bound of connections the oldest is closed.

    Args:
        listener: the socket.
        state: what is shown.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, listener: socket.socket, state: SharedState) -> None:
        super().__init__(listener.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self._state = state
        self._reporter = state.reporter("status")
        self._open: dict[socket.socket, None] = {}
        """The connections, the oldest first."""

    def process_request(self, request: Any, client_address: Any) -> None:
        """Handle a connection in a thread; the oldest of too many has to go."""
        self._open[request] = None
        if len(self._open) > _MAX_CONNECTIONS:
            oldest = list(self._open)[0]  # noqa: RUF015 - a list is made at once, while threads take others out
            with suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread can be started
            del self._open[request]
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handle a connection, whatever comes of it."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            del self._open[request]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that goes away is no event."""

    def snapshot(self) -> dict[str, Any]:
        """Return the state now."""
        words = Words(self._state.draining, self._state.engine_timeout)
        return snapshot(self._state.reports(), words, time.monotonic())

    def note_scrape(self, when: float) -> None:
        """Note that the metrics of a time have been read, for which the end of a failed start waits."""
        self._reporter.update(scraped=when)


def _live(server: StatusServer) -> Answer:
    state = server.snapshot()
    is_live = state["phase"] != "failed"
    return 200 if is_live else 503, _JSON, _encode({"live": is_live, "phase": state["phase"]})


def _ready(server: StatusServer) -> Answer:
    state = server.snapshot()
    return 200 if state["ready"] else 503, _JSON, _encode({key: state[key] for key in ("ready", "phase", "reason")})


def _state(server: StatusServer) -> Answer:
    return 200, _JSON, _encode(server.snapshot())


def _metrics(server: StatusServer) -> Answer:
    return 200, _TEXT, exposition(server.snapshot())


_ROUTES: dict[str, Callable[[StatusServer], Answer]] = {
    "/live": _live,
    "/ready": _ready,
    "/state": _state,
    "/metrics": _metrics,
}


class _Bounded(io.BufferedReader):
    """Reads lines, of which there is a bound for all together: a hundred headers may have 64 KiB each otherwise."""

    left = 0

    def readline(self, size: int | None = -1) -> bytes:
        """Read a line.

        Raises:
            LineTooLong: it goes beyond the bound; for a header that becomes status 431.
        """
        bound = self.left + 1
        line = super().readline(bound if size is None or size < 0 else min(size, bound))
        self.left -= len(line)
        if self.left < 0:
            raise LineTooLong("request")
        return line


class _Handler(BaseHTTPRequestHandler):
    server: StatusServer
    rfile: _Bounded
    protocol_version = "HTTP/1.1"
    server_version = "expo-serve"
    sys_version = ""
    timeout = 20.0
    """Seconds that a connection may be silent."""
    error_content_type = _JSON
    error_message_format = '{"error": {"message": "%(message)s", "code": %(code)d}}\n'

    def do_GET(self) -> None:
        route = _ROUTES.get(self.path.partition("?")[0])
        if route is None:
            self.send_error(404, f"not found; there are {', '.join(_ROUTES)}")
            return
        began = time.monotonic()
        status, kind, body = route(self.server)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            if route is _metrics:
                self.server.note_scrape(began)

    do_HEAD = do_GET

    def setup(self) -> None:
        """Read from the connection within a bound."""
        super().setup()
        self.rfile = _Bounded(self.connection.makefile("rb", 0))

    def handle_one_request(self) -> None:
        """Answer a request; one whose first line is too long is not answered."""
        self.rfile.left = _MAX_REQUEST_BYTES
        try:
            super().handle_one_request()
        except LineTooLong:
            self.close_connection = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with an error that holds nothing of the request."""
        phrase = message if code == 404 else self.responses.get(code, ("error", ""))[0]
        super().send_error(code, phrase, explain)

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: probes come every few seconds."""


def _encode(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def main(listener: int, memory: int) -> int:
    """Serve until standard input ends; returns 0.

    Args:
        listener: descriptor of the listening socket.
        memory: descriptor of the shared memory.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # those of a whole process group: the command's end ends this
    server = StatusServer(socket.socket(fileno=listener), SharedState(memory))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while os.read(0, 1):
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
