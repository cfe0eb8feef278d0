"""Servers that a probe may meet: they answer well, badly, slowly or not at all."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_TLS_HANDSHAKE = b"\x16"
REPORT = {"alpha": -0.5, "served_model_names": ["first", "second"]}


@contextmanager
def answering(body: bytes, status: int = 200, **headers: str) -> Iterator[str]:
    """The URL of something that gives this answer to every request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@contextmanager
def talking(talk: Callable[[socket.socket, bytes], None]) -> Iterator[str]:
    """The URL of something that is called with each connection and its request."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    talk(connection, _read_request(connection))

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _read_request(connection: socket.socket) -> bytes:
    """Read all of a request: what is closed with bytes unread is reset."""
    request = b""
    while b"\r\n\r\n" not in request and not request.startswith(_TLS_HANDSHAKE):
        request += connection.recv(1 << 16) or b"\r\n\r\n"
    head, end, body = request.partition(b"\r\n\r\n")
    length = re.search(rb"\r\nContent-Length: (\d+)", head)
    while length and len(body) < int(length[1]):
        body += connection.recv(1 << 16)
    return head + end + body


@contextmanager
def sending(answer: bytes) -> Iterator[str]:
    """The URL of something that answers every request with these bytes, and hangs up."""
    with talking(lambda connection, _: connection.sendall(answer)) as url:
        yield url
