"""A server that drains, as a process for the keeper to watch: it stands where vLLM's API server does.

Run with a request like the keeper's::

    {"port": int, "open": [seconds, ...], "drain_seconds": int, "deaf": bool, "answers": bool, "status_fd": int,
     "state_fd": int}

A request is open for so many seconds from the beginning of a drain, or until it is cut. SIGTERM ends it with code 0,
unless it is deaf. It answers the watchdog unless ``answers`` is false.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from expo_serve.state.shared import SharedState


def main() -> None:
    """Serve until SIGTERM."""
    request = json.load(sys.stdin)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if request.get("deaf") else lambda *_: sys.exit(0))
    state = SharedState(request["state_fd"])
    with socket.create_server(("127.0.0.1", request["port"])):
        status = {"host": "127.0.0.1", "port": request["port"], "uds": None}
        status["shutdown_timeout"] = request.get("drain_seconds", 5)
        os.write(request["status_fd"], json.dumps(status).encode() + b"\n")
        threading.Thread(target=_follow, args=(state, request), daemon=True).start()
        while True:
            time.sleep(60)


def _follow(state: SharedState, request: dict[str, Any]) -> None:
    reporter = state.reporter("api", answered=time.monotonic())
    seconds, cut = request.get("open", []), 0
    while True:
        if state.cutting and not cut:
            cut = sum(time.monotonic() < state.draining + still for still in seconds)
        still_open = sum(not state.draining or time.monotonic() < state.draining + still for still in seconds)
        now = time.monotonic()
        reporter.update(open=0 if cut else still_open, cut=cut, reported=now)
        if request.get("answers", True):
            reporter.update(answered=now)
        time.sleep(0.05)


if __name__ == "__main__":
    main()
