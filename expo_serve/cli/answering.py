"""Whether vLLM's server answers at its address, and the socket file that it leaves."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

_SECONDS = 0.5
_LOCAL = {None: "127.0.0.1", "": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def answers(address: Mapping[str, Any]) -> bool:
    """Return whether a server accepts connections.

    Args:
        address: ``uds``, the path of a socket, or else ``host`` and ``port``, as vLLM's flags have them.
    """
    try:
        if address["uds"]:
            _connect_to_path(address["uds"])
        else:
            host = _LOCAL.get(address["host"], address["host"])
            socket.create_connection((host, address["port"]), timeout=_SECONDS).close()
    except OSError:
        return False
    return True


def remove_socket(path: str) -> None:
    """Remove a socket file behind which nobody listens; neither vLLM nor uvicorn does."""
    with suppress(OSError):
        if stat.S_ISSOCK(os.stat(path).st_mode):  # connecting to any other file is refused too
            try:
                _connect_to_path(path)
            except ConnectionRefusedError:
                os.unlink(path)


def _connect_to_path(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_SECONDS)
        connection.connect(path)
