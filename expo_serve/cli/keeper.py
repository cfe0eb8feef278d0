"""The keeper: starts vLLM's server, watches all of its processes, and makes sure that all of them end.

vLLM alone does not guarantee that: its front end can stay alive for minutes after its engine has failed, can ignore a
first SIGTERM, and can leave orphans that hold memory. The keeper adopts all orphans of vLLM's processes, so it finds
every one of them, in whatever order they die.

Protocol on standard input: the first line is the request as JSON; every byte after it is the number of a signal that
the command received; the end of the input means that the command itself is gone. The keeper ignores signals that are
sent to it directly: a signal to the whole process group also reaches the command, and would count twice.
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
import traceback
from pathlib import Path
from typing import Any

from expo_serve import errors
from expo_serve.cli import processes
from expo_serve.cli.log_tail import LogTail
from expo_serve.cli.vllm_log import PROCESS_NAME_PREFIX
from expo_serve.errors import ServeError

_POLL_SECONDS = 0.2
_WATCH_SECONDS = 2.0
_END_BY_ITSELF_SECONDS = 10.0
"""Time for vLLM to end by itself after one of its processes has died or reported a failure."""
_STOP_SECONDS = 4.0
"""Time for vLLM to end after SIGTERM, in addition to its own --shutdown-timeout; then SIGTERM is sent again."""
_STOP_AGAIN_SECONDS = 3.0
"""Time for vLLM to end after the second SIGTERM; then all of its processes are killed."""


class Keeper:
    """One run of vLLM's server, from start to exit code."""

    module = "expo_serve.vllm_plugin.server"
    """What is run as the server."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.signals: list[int] = []
        self._request = request
        self._log = LogTail()
        self._status: dict[str, Any] | None = None
        self._serving = False
        self._survey = processes.Survey(os.getpid(), _title_prefix())
        self._next_watch = 0.0
        self._give_up_at: float | None = None
        self._stopping_since: float | None = None
        self._asked_again = False
        self._cause: str | None = None

    def run(self) -> int:
        """Start vLLM and wait until none of its processes is left; returns the command's exit code."""
        code = self._watch_over()
        left_behind = self._end_processes()
        self._log.finish()
        if left_behind and self._cause:
            errors.warn(left_behind)
        if (cause := self._cause or left_behind) and (left_behind or not self._log.ends_with_error()):
            errors.show(ServeError(cause))
        return 1 if left_behind else code

    def _watch_over(self) -> int:
        try:
            self._start()
            while (code := self._step()) is None:
                time.sleep(_POLL_SECONDS)
        except Exception as error:  # noqa: BLE001 - there should be none, but even then no process may stay
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            self._cause = f"the process that watches vLLM failed at {where}: {type(error).__name__}: {error}"
            return 1
        return code

    def _end_processes(self) -> str | None:
        """End what is left, and return what cannot be said to have ended."""
        try:
            processes.end_descendants(os.getpid(), self._survey.segments)
        except ServeError as error:
            return error.message
        return None

    def _start(self) -> None:
        read_end, write_end = os.pipe()
        self._server = subprocess.Popen(
            [sys.executable, "-m", self.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(write_end, *([self._request["sweep_fd"]] if "sweep_fd" in self._request else [])),
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
        """Check everything once; returns the exit code once it is known."""
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
        """Read the signals that the command passed on; returns False if the command is gone."""
        if not select.select([0], [], [], 0)[0]:
            return True
        numbers = os.read(0, 1 << 16)
        self.signals += numbers
        return bool(numbers)

    def _verdict(self) -> int:
        """Return the exit code after the server's first process has ended."""
        if self.signals:
            return self._stopped_code()
        code = self._server.returncode
        if code == 2 and self._status is None:
            return 2  # vLLM has refused a flag and printed why
        self._log.finish_reading()
        ended = f"ended with code {code}" if code >= 0 else f"was killed by signal {-code}"
        known = self._log.root_cause() or self._cause or self._log.last_exception()
        self._cause = known or f"vLLM's server {ended}"
        return 1

    def _stop(self) -> int | None:
        """Send SIGTERM, after a while once more, then give up waiting. A second signal ends everything at once."""
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
        """Notice an engine or worker that died or failed while the front end stays alive."""
        now = time.monotonic()
        if self._give_up_at is not None:
            if now < self._give_up_at:
                return None
            self._cause = self._log.root_cause() or self._cause or "vLLM's engine failed"
            return 1
        if self._log.failed.is_set() and not self._serving:  # while serving only the death of a process counts
            self._give_up_at = now + _END_BY_ITSELF_SECONDS
        if now >= self._next_watch:
            self._next_watch = now + _WATCH_SECONDS
            self._look_for_deaths(now)
        return None

    def _look_for_deaths(self, now: float) -> None:
        known = self._survey.titles  # before those that live, as it grows in the background
        living = {process.pid for process in processes.descendants(os.getpid())}
        if lost := {title for pid, title in known.items() if pid not in living}:
            state = "while serving" if self._serving else "before serving"
            self._cause = f"vLLM's process {', '.join(sorted(lost))} died {state}"
            self._give_up_at = now + _END_BY_ITSELF_SECONDS
            return
        self._survey.go_on()


def _title_prefix() -> str:
    """Return the prefix of the titles of vLLM's processes (``VLLM::EngineCore``, ``VLLM::Worker_TP0``)."""
    return os.environ.get(*PROCESS_NAME_PREFIX) + "::"


def _answers(status: dict[str, Any]) -> bool:
    """Return whether vLLM accepts connections at its address."""
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


def main(kind: type[Keeper] = Keeper) -> int:
    """Read the request and run the server; returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # not SIG_IGN: vLLM's processes would inherit it
    processes.adopt_orphans()
    received = b""
    while b"\n" not in received:
        chunk = os.read(0, 1 << 16)
        if not chunk:
            return 1
        received += chunk
    line, _, signals = received.partition(b"\n")
    keeper = kind(json.loads(line))
    keeper.signals += signals
    return keeper.run()


if __name__ == "__main__":
    sys.exit(main())
