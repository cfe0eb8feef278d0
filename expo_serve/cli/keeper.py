"""The keeper: starts vLLM's server, watches all of its processes, and makes sure that all of them end.

vLLM alone does not guarantee that: its front end can stay alive for minutes after its engine has failed, can ignore a
first SIGTERM, and can leave orphans that hold memory. The keeper adopts all orphans of vLLM's processes, so it finds
every one of them, in whatever order they die.

Protocol on standard input: the first line is the request as JSON, which the server documents (``module`` names another
server than :mod:`expo_serve.vllm_plugin.server`, ``folder`` is one for files that vLLM leaves behind); every byte after
it is the number of a signal that the command received; the end of the input means that the command itself is gone. The
keeper ignores signals that are sent to it directly: a signal to the whole process group also reaches the command, and
would count twice.
"""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from threading import Thread
from typing import Any

import psutil

from expo_serve import errors
from expo_serve.cli import processes
from expo_serve.cli.answering import answers, remove_socket
from expo_serve.cli.family import REMOVE_SECONDS, SIGNALS
from expo_serve.cli.hanging import Hanging, show_stacks
from expo_serve.cli.kernel_kills import OutOfMemory, describe_exit
from expo_serve.cli.live_line import can_show
from expo_serve.cli.log_tail import LogTail
from expo_serve.cli.probe_state import line_of_state
from expo_serve.cli.stopping import STOP_SECONDS, WORKERS_STOP_SECONDS, Stop
from expo_serve.cli.vllm_log import PROCESS_NAME_PREFIX
from expo_serve.errors import ServeError, UsageError
from expo_serve.state.shared import SharedState
from expo_serve.state.snapshot import Words, first_killed, reported_error, snapshot

_STDERR = 2
_POLL_SECONDS = 0.2
_WATCH_SECONDS = 2.0
_END_BY_ITSELF_SECONDS = 10.0
"""Time for vLLM to end by itself after one of its processes has died or reported a failure."""
_FIRST_VARIABLE = "PYTHONSAFEPATH"
_BEAT_SECONDS = 1.0
"""How often the command is told that this process lives."""
_STUCK_SECONDS = 20.0
"""In one step, after which the command is told no more: no step takes that long, looking up a slow name included."""
_STUCK_AT_END_SECONDS = 5.0


class Keeper:
    """One run of vLLM's server, from start to exit code."""

    module = "expo_serve.vllm_plugin.server"
    """What is run as the server, unless the request names another."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.signals: list[int] = []
        self._request = request
        self._log = LogTail(self._live_line if can_show(_STDERR) else None)
        self._status: dict[str, Any] | None = None
        self._serving = False
        self._survey = processes.Survey(os.getpid(), _title_prefix())
        self._next_watch = 0.0
        self._give_up_at: float | None = None
        self._state = SharedState(request["state_fd"]) if "state_fd" in request else SharedState.create()
        self._reporter = self._state.reporter("keeper")
        self._folder: str | None = request.get("folder")
        self._hanging = Hanging(self._state)
        self._out_of_memory = OutOfMemory()
        self._stop_under_way: Stop | None = None
        self._cause: str | None = None
        self._reason = "serve"
        """Of the cause: one of :data:`expo_serve.errors.REASONS`."""
        self._shown: str | None = None
        """The cause as the status port shows it, where it may quote a request."""
        self._moved = time.monotonic()
        """When the last step began; infinity at the end, whose every step is bounded."""

    def run(self) -> int:
        """Start vLLM and wait until none of its processes is left; returns the command's exit code."""
        Thread(target=self._beat, daemon=True).start()
        code = self._watch_over()
        self._moved = math.inf
        if code and self._cause:
            self._fail(self._reason, self._cause)
        left_behind = self._end_processes()
        self._log.finish()
        if left_behind and self._cause:
            errors.warn(left_behind)
        if (cause := self._cause or left_behind) and (left_behind or not self._log.ends_with_error()):
            errors.show(ServeError(cause))
        return 1 if left_behind else code

    def _live_line(self) -> str | None:
        """Return how far the start is; None once it is over."""
        state = snapshot(self._state.reports(), Words(), time.monotonic())
        if state["phase"] not in ("resolve", "start", "load", "warm_up"):
            return None
        return f"expo-serve: {line_of_state(state)}"

    def _fail(self, reason: str, cause: str) -> None:
        """Show on the status port that all is over; the first cause stays."""
        self._reason, self._cause = reason, cause
        self._reporter.fail(reason, self._shown or cause)
        self._reporter.enter("failed")

    def _beat(self) -> None:
        while True:
            limit = _STUCK_AT_END_SECONDS if self.signals else _STUCK_SECONDS
            if (now := time.monotonic()) < self._moved + limit:
                self._reporter.update(alive=now)
            time.sleep(_BEAT_SECONDS)

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
        except Exception as error:  # noqa: BLE001 - the command tries again
            return f"processes of vLLM may be left behind: {type(error).__name__}: {error}"
        finally:
            processes.in_time(self._remove_files, None, REMOVE_SECONDS)
        return None

    def _remove_files(self) -> None:
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._status and self._status.get("uds"):
            remove_socket(self._status["uds"])

    def _start(self) -> None:
        read_end, write_end = os.pipe()
        descriptors = {"status_fd": write_end, "state_fd": self._state.descriptor}
        self._server = subprocess.Popen(
            [sys.executable, "-m", self._request.get("module", self.module)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(*descriptors.values(), *([self._request["sweep_fd"]] if "sweep_fd" in self._request else [])),
            env=_with_folder(self._folder),
        )
        os.close(write_end)
        os.set_blocking(read_end, False)
        self._status_pipe = read_end
        for output, target in ((self._server.stdout, 1), (self._server.stderr, 2)):
            assert output is not None
            self._log.follow(output.fileno(), target)
        self._log.show_live()
        assert self._server.stdin is not None
        with self._server.stdin as pipe:
            pipe.write(json.dumps({**self._request, **descriptors}).encode())

    def _step(self) -> int | None:
        """Check everything once; returns the exit code once it is known."""
        self._moved = time.monotonic()
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
        if self.signals and self._give_up_at is None and not self._is_draining():
            return self._stopped_code()
        code = self._server.returncode
        if code == UsageError.exit_code and not self._serving:
            return code  # vLLM has refused its flags, and why has been printed
        self._log.finish_reading()
        if code < 0:
            self._reason, self._cause = self._death("vLLM's server", code)
        else:
            self._blame(f"vLLM's server ended with code {code}", self._log.last_exception() if code else None)
        return 1

    def _is_draining(self) -> bool:
        """Return whether vLLM is to go on for now, although a signal has come: it has requests to answer."""
        has_requests = self._serving and not (self._status or {}).get("ranks")
        return has_requests and not (self._stop_under_way and self._stop_under_way.has_terminated)

    def _blame(self, otherwise: str, last_exception: str | None = None) -> None:
        """Set the cause: what a process of ours has reported, a signal, a known death, vLLM's log, or what is left."""
        if error := reported_error(self._state.reports()):
            self._reason, self._cause = error["reason"], error["message"]
        elif killed := first_killed(self._state.reports("parent"), self._log.failed_time):
            pid, name, code = killed
            self._reason, self._cause = self._death(f"vLLM's process {self._survey.titles.get(pid, name)}", code)
        elif not self._cause:
            exception = self._log.root_cause() or last_exception
            self._cause = exception or otherwise
            if exception and self._serving:  # an exception's message may hold what a request held
                name = exception.partition(":")[0]
                is_class = all(part.isidentifier() for part in name.split("."))
                self._shown = f"{name if is_class else 'an error'} (what it says is in the log)"

    def _death(self, what: str, code: int) -> tuple[str, str]:
        """Return the reason and the cause of a process that a signal has killed."""
        state = "while serving" if self._serving else "before serving"
        died = f"{what} {describe_exit(code)} {state}"
        if -code == signal.SIGKILL and (cause := self._out_of_memory.since_start()):
            return "out_of_memory", f"{died}: {cause}"
        return "died", died

    def _stop(self) -> int | None:
        """Go on with the stop that a signal asked for. A second signal ends everything at once."""
        if len(self.signals) > 1:
            return 128 + self.signals[-1]
        if self._stop_under_way is None:
            if self._give_up_at is not None:  # it has failed already
                self._blame("vLLM's engine failed")
                return 1
            status = self._status or {}
            seconds = float(status.get("shutdown_timeout") or 0.0) if self._serving else None
            patience = WORKERS_STOP_SECONDS if status.get("ranks") else STOP_SECONDS
            self._stop_under_way = Stop(self._server, self._state, seconds, patience)
        if self._is_draining() and ((code := self._watch()) is not None or self._give_up_at is not None):
            return code  # it fails in the middle of its drain
        if self._stop_under_way.go_on():
            return None
        if not self._serving:
            return self._stopped_code()
        self._cause = f"vLLM did not end within {self._stop_under_way.seconds:.0f} s of the signal and was killed"
        return 1

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
            self._serving = self._has_loaded() if self._status.get("ranks") else answers(self._status)
            if self._serving:
                self._reporter.enter("serving")

    def _has_loaded(self) -> bool:
        """Return whether all ranks here have their weights: what can be known where another machine has the port."""
        assert self._status is not None
        state = snapshot(self._state.reports(), Words(), time.monotonic())
        return bool(state["phase"] == "warm_up") and len(state["load"]["ranks"]) >= self._status["ranks"]

    def _watch(self) -> int | None:
        """Notice an engine or worker that died or failed while the front end stays alive."""
        now = time.monotonic()
        if self._give_up_at is not None:
            if now < self._give_up_at:
                return None
            self._blame("vLLM's engine failed")
            return 1
        if self._log.failed.is_set() and not self._serving:  # while serving only the death of a process counts
            self._give_up_at = now + _END_BY_ITSELF_SECONDS
        if now >= self._next_watch:
            self._next_watch = now + _WATCH_SECONDS
            self._look_for_deaths(now)
            if self._serving and (hang := self._hanging.look(self._survey.titles)):
                self._fail("hung", hang.cause)
                self._moved = math.inf  # it ends now
                show_stacks(hang.pids)
                return 1
        return None

    def _look_for_deaths(self, now: float) -> None:
        known = self._survey.titles  # before those that live, as it grows in the background
        try:
            living = {process.pid for process in processes.descendants(os.getpid())}
        except (psutil.Error, OSError):  # no file descriptor free, for example: the next time
            return
        if lost := {title for pid, title in known.items() if pid not in living}:
            state = "while serving" if self._serving else "before serving"
            self._cause, self._reason = f"vLLM's process {', '.join(sorted(lost))} died {state}", "died"
            self._give_up_at = now + _END_BY_ITSELF_SECONDS
            self._reporter.update(has_lost=True)
            return
        self._survey.go_on()


def _with_folder(folder: str | None) -> dict[str, str]:
    """Return the environment of vLLM's processes, with a folder for the sockets and files that they leave behind.

    What torch keeps there from one start to the next stays where it is. The first variable is one that nobody sets
    anew: where its place in memory changes, setproctitle no longer finds the title, by which a process is known here.
    """
    environment = {_FIRST_VARIABLE: "1", **os.environ}
    if folder is not None:
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}")
        environment["TMPDIR"] = folder
    return environment


def _title_prefix() -> str:
    """Return the prefix of the titles of vLLM's processes (``VLLM::EngineCore``, ``VLLM::Worker_TP0``)."""
    return os.environ.get(*PROCESS_NAME_PREFIX) + "::"


def main(kind: type[Keeper] = Keeper) -> int:
    """Read the request and run the server; returns the exit code."""
    for number in SIGNALS:
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
