"""A server that logs a lot, as a process for the keeper to watch: it stands where vLLM's server does.

Run by ``tests.cli.log_keeper`` with a request like the keeper's::

    {"port": int, "lines": int, "status_fd": int}

For each byte that it gets it prints so many numbered lines of 100 bytes, half of them on standard error, and answers
``ok``. It gets a child with vLLM's kind of title at the first connection that sends nothing: then the keeper knows that
it serves. SIGTERM ends it with code 0.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from itertools import count
from shutil import which

TITLE = "VLLM::Test"


def main() -> None:
    """Serve until SIGTERM."""
    request = json.load(sys.stdin)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    children: list[subprocess.Popen[bytes]] = []
    numbers = count()
    with socket.create_server(("127.0.0.1", request["port"])) as listener:
        status = {"host": "127.0.0.1", "port": request["port"], "uds": None, "shutdown_timeout": 0}
        os.write(request["status_fd"], json.dumps(status).encode() + b"\n")
        while True:
            connection, _ = listener.accept()
            with connection:
                if connection.recv(1):
                    _log(numbers, request["lines"])
                    connection.sendall(b"ok")
                elif not children:
                    children.append(subprocess.Popen([TITLE, "600"], executable=which("sleep")))


def _log(numbers: count[int], lines: int) -> None:
    for _ in range(lines // 2):
        for stream in (sys.stdout, sys.stderr):
            print(f"{next(numbers):<99}", file=stream)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
