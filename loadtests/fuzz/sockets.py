"""Sends bytes as they are, and takes what comes."""

from __future__ import annotations

import socket
import time

_PAUSE_SECONDS = 0.02
_MOST_BYTES = 2 * 2**20


def exchange(port: int, parts: tuple[bytes, ...], *, first_seconds: float, quiet_seconds: float) -> bytes:
    """Send some bytes and return what came back until the connection was closed or silent.

    Args:
        port: of 127.0.0.1.
        parts: sent one after the other, with a moment between them.
        first_seconds: how long to wait for the first byte.
        quiet_seconds: after how long without a byte the answer is taken for complete.
    """
    received = bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=first_seconds) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(_PAUSE_SECONDS if len(parts) > 1 else 0)
            while len(received) < _MOST_BYTES:
                chunk = connection.recv(65536)
                if not chunk:
                    break
                received += chunk
                connection.settimeout(quiet_seconds)
        except (TimeoutError, ConnectionResetError, BrokenPipeError):
            pass
    return bytes(received)
