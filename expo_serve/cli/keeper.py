"""The keeper: starts vLLM's server, watches all its processes, and answers for how they end.

vLLM's front end was seen alive and silent minutes after its engine had failed, and deaf to a first
SIGTERM; orphans were seen to keep memory. The keeper is the adopting parent of all of vLLM's
processes, so it finds each of them, whoever dies first. It reads the request on one line of its
standard input; after it, each byte is a signal that the command got, and the end of the input means that the
command itself is gone. Signals sent to the keeper do nothing: whoever signals a whole group of processes would be
heard twice.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from expo_serve.cli import processes
from expo_serve.cli.log_tail import PREFIX_OF_OURS, LogTail

_POLL_SECONDS = 0.2
_WATCH_SECONDS = 2.0
_END_BY_ITSELF_SECONDS = 10.0
"""How long vLLM may take to end by itself after one of its processes died or said it failed."""
_STOP_SECONDS = 4.0
"""How long vLLM may take to end after SIGTERM, besides its own --shutdown-timeout; then it is asked again."""
_STOP_AGAIN_SECONDS = 3.0


class Keeper:
    """One run of vLLM's server, from start to exit code."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.signals: list[int] = []
        self._request = request
        self._log = LogTail()
        self._status: dict[str, Any] | None = None
        self._serving = False
        self._known: dict[int, str] = {}
        self._segments: set[Path] = set()
        self._next_watch = 0.0
        self._give_up_at: float | None = None
        self._stopping_since: float | None = None
        self._asked_again = False
        self._cause: str | None = None

    def run(self) -> int:
        """Start vLLM and stay until nothing of it is left; returns the command's exit code."""
        self._start()
        while (code := self._step()) is None:
            time.sleep(_POLL_SECONDS)
        processes.end_descendants(os.getpid(), self._segments)
        self._log.finish()
        if self._cause and not self._log.says_error():
            print(f"{PREFIX_OF_OURS}{self._cause}", file=sys.stderr, flush=True)
        return code

    def _start(self) -> None:
        read_end, write_end = os.pipe()
        self._server = subprocess.Popen(
            [sys.executable, "-m", "expo_serve.vllm_plugin.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(write_end,),
        )
        os.close(write_end)
        os.set_blocking(read_end, False)
        self._status_pipe = read_end
        for output, target in ((self._server.stdout, 1), (self._server.stderr, 2)):
            assert output is not None
            self._log.follow(output.fileno(), target)
        assert self._server.stdin is not None
        with self._server.stdin as pipe:
            pipe.write(json.dumps({**self._request, "status_fd": write_end}).encode())

    def _step(self) -> int | None:
        """One look at everything; the exit code once it is known."""
        processes.reap_orphans(keep=self._server.pid)
        if not self._listen():
            return 1
        if self._server.poll() is not None:
            return self._verdict()
        if self.signals:
            return self._stop()
        self._look_for_serving()
        return self._watch()

    def _listen(self) -> bool:
        """Take the signals that the command passed on; False when it is gone."""
        if not select.select([0], [], [], 0)[0]:
            return True
        numbers = os.read(0, 1 << 16)
        self.signals += numbers
        return bool(numbers)

    def _verdict(self) -> int:
        """The server's first process has ended; what does that mean?"""
        if self.signals:
            return self._stopped_code()
        code = self._server.returncode
        if code == 2 and self._status is None:
            return 2  # vLLM refused a flag and said so
        self._log.finish()
        ended = f"ended with code {code}" if code >= 0 else f"was killed by signal {-code}"
        known = self._log.root_cause() or self._cause or self._log.last_exception()
        self._cause = known or f"vLLM's server {ended}"
        return 1

    def _stop(self) -> int | None:
        """Pass a signal on, once politely and once more, then end it all. A second signal ends at once."""
        now = time.monotonic()
        if len(self.signals) > 1:
            return 128 + self.signals[-1]
        if self._stopping_since is None:
            self._stopping_since = now
            self._server.send_signal(signal.SIGTERM)
        waited = now - self._stopping_since
        limit = _STOP_SECONDS + (float((self._status or {}).get("shutdown_timeout") or 0) if self._serving else 0)
        if waited > limit and not self._asked_again:
            self._asked_again = True
            self._server.send_signal(signal.SIGTERM)
        if waited > limit + _STOP_AGAIN_SECONDS:
            if self._serving:
                self._cause = f"vLLM did not end within {waited:.0f} s of SIGTERM and was killed"
                return 1
            return self._stopped_code()
        return None

    def _stopped_code(self) -> int:
        return 0 if self._serving else 128 + self.signals[0]

    def _look_for_serving(self) -> None:
        if self._status is None:
            try:
                line = os.read(self._status_pipe, 1 << 16)
            except BlockingIOError:
                return
            self._status = json.loads(line) if line else {}
        elif not self._serving and "port" in self._status:
            self._serving = _answers(self._status)

    def _watch(self) -> int | None:
        """Notice an engine or worker that died or failed while the front end goes on as if nothing were."""
        now = time.monotonic()
        if self._give_up_at is not None:
            if now < self._give_up_at:
                return None
            self._cause = self._log.root_cause() or self._cause or "vLLM's engine failed"
            return 1
        if self._log.failed.is_set() and not self._serving:  # later a dead process says it, and no log line
            self._give_up_at = now + _END_BY_ITSELF_SECONDS
        if now >= self._next_watch:
            self._next_watch = now + _WATCH_SECONDS
            self._look_for_deaths(now)
        return None

    def _look_for_deaths(self, now: float) -> None:
        living = {process.pid for process in processes.descendants(os.getpid())}
        if lost := {title for pid, title in self._known.items() if pid not in living}:
            state = "while serving" if self._serving else "before serving"
            self._cause = f"vLLM's process {', '.join(sorted(lost))} died {state}"
            self._give_up_at = now + _END_BY_ITSELF_SECONDS
            return
        self._known |= processes.titled(os.getpid(), _title_prefix())
        self._segments |= processes.segments_of(os.getpid())


def _title_prefix() -> str:
    """How the titles of vLLM's processes begin (``VLLM::EngineCore``, ``VLLM::Worker_TP0``)."""
    return os.environ.get("VLLM_PROCESS_NAME_PREFIX", "VLLM") + "::"


def _answers(status: dict[str, Any]) -> bool:
    """Whether somebody listens where vLLM serves."""
    host = {None: "127.0.0.1", "": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
    try:
        if status["uds"]:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(0.5)
                connection.connect(status["uds"])
        else:
            address = (host.get(status["host"], status["host"]), status["port"])
            socket.create_connection(address, timeout=0.5).close()
    except OSError:
        return False
    return True


def main() -> int:
    """Read the request and keep the server."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which vLLM's processes would inherit
    processes.adopt_orphans()
    received = b""
    while b"\n" not in received:
        chunk = os.read(0, 1 << 16)
        if not chunk:
            return 1
        received += chunk
    line, _, signals = received.partition(b"\n")
    keeper = Keeper(json.loads(line))
    keeper.signals += signals
    return keeper.run()


if __name__ == "__main__":
    sys.exit(main())
