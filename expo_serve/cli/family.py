"""The processes of the command that serves: the status process, the keeper, and all that they leave."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any

from expo_serve import errors
from expo_serve.cli import processes
from expo_serve.cli.awake import Awake
from expo_serve.errors import AddressError, ExpoError, ServeError, line_of, reason_of
from expo_serve.state.shared import SharedState

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_TICK_SECONDS = 1.0
_MAX_FOLDER_BYTES = 107 - 1 - 36
"""Of a folder with vLLM's sockets, whose names are UUIDs: a socket's path has 107 bytes at most, unix(7)."""
_SHORT_PLACE = "/tmp"
_SILENT_SECONDS = 30.0
"""After which a keeper that writes nothing counts as hung; it writes every second."""
_SILENT_AT_END_SECONDS = 10.0
_ASLEEP_SECONDS = 5.0
"""Without a look at the keeper: this process has been frozen, and so has the keeper."""
REMOVE_SECONDS = 3.0
"""For files: a file system that hangs must not hold up the end."""
_SHOWN_SECONDS = 20.0
"""For which a failed start stays on the status port: longer than the usual interval of Prometheus, 15 s."""


class Family:
    """The command's children, and what they share.

    Args:
        started: CLOCK_MONOTONIC at the start of the command, in seconds.
        engine_timeout: in seconds; 0 is off.
        listener: the socket of the status port; None without one.
    """

    def __init__(self, started: float, engine_timeout: float, listener: socket.socket | None) -> None:
        self.state = SharedState.create()
        self.state.engine_timeout = engine_timeout
        started_at = time.time() - (time.monotonic() - started)
        self.reporter = self.state.reporter("command", started=started, started_at=started_at)
        self._listener = listener
        self._status: subprocess.Popen[bytes] | None = None
        self._keeper: subprocess.Popen[bytes] | None = None
        self._signals: list[int] = []
        self._folder: str | None = None

    def __enter__(self) -> Family:
        self._show()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._hide()
        if self._folder:
            remove = partial(shutil.rmtree, self._folder, ignore_errors=True)
            processes.in_time(remove, None, REMOVE_SECONDS)
        self.state.close()

    def _show(self) -> None:
        """Start the status process, in the place of one that ended."""
        self._hide()
        if self._listener is not None:
            descriptors = (self._listener.fileno(), self.state.descriptor)
            self._status = subprocess.Popen(
                [sys.executable, "-m", "expo_serve.state.server", *map(str, descriptors)],
                stdin=subprocess.PIPE,  # its end tells the process that this one is gone
                pass_fds=descriptors,
                env=_environment(),
            )

    def _hide(self) -> None:
        if self._status is not None:
            with self._status as process:  # closes its pipe and waits
                process.kill()

    def keep(self, request: dict[str, Any]) -> int:
        """Start the keeper and wait for its end; returns the exit code.

        Args:
            request: for ``expo_serve.vllm_plugin.server``, which documents the keys.

        Raises:
            ServeError: the keeper was killed, or hung; or no temporary files can be made.
        """
        self._folder = _make_folder()
        processes.adopt_orphans()
        self._keeper = keeper = subprocess.Popen(
            [sys.executable, "-m", "expo_serve.cli.keeper"],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C at a terminal reaches only this process, which passes it on
            pass_fds=(self.state.descriptor,),
            env=_environment(),
        )
        assert keeper.stdin is not None
        shared = {"state_fd": self.state.descriptor, "folder": self._folder}
        with suppress(BrokenPipeError):
            keeper.stdin.write(json.dumps({**request, **shared}).encode() + b"\n")
            keeper.stdin.flush()  # left open: its end tells the keeper that this process is gone
        for number in SIGNALS:
            take(number, self._pass_on)
        return self._code(self._wait(keeper))

    def _pass_on(self, number: int, _: object) -> None:
        self._signals.append(number)
        if self._keeper is not None and self._keeper.stdin is not None:
            with suppress(OSError):
                os.write(self._keeper.stdin.fileno(), bytes([number]))

    def _wait(self, keeper: subprocess.Popen[bytes]) -> int:
        """Wait for the keeper; meanwhile reap what else ends, as process 1 of a container has to."""
        awake = Awake(_ASLEEP_SECONDS)
        with _end_of(keeper) as end:
            while keeper.poll() is None:
                with suppress(InterruptedError):
                    select.select(end, [], [], _TICK_SECONDS)
                self._reap()
                if self._is_silent(awake.look()):
                    keeper.kill()
        return keeper.wait()

    def _reap(self) -> None:
        reaped = processes.reap_orphans(keep=self._keeper.pid if self._keeper else 0)
        if self._status is not None and self._status.pid in reaped:
            self._show()

    @contextmanager
    def reaping(self) -> Iterator[None]:
        """Reap in a thread what ends meanwhile, as process 1 of a container has to; nothing else may start processes.

        Any other process gets no children but its own yet.
        """
        if os.getpid() != 1:
            yield
            return
        done = threading.Event()
        thread = threading.Thread(target=self._reap_until, args=(done,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _reap_until(self, done: threading.Event) -> None:
        while not done.wait(_TICK_SECONDS):
            self._reap()

    def _is_silent(self, awake_since: float) -> bool:
        written = [report["alive"] for report in self.state.reports("keeper") if "alive" in report]
        limit = _SILENT_AT_END_SECONDS if self._signals else _SILENT_SECONDS
        return bool(time.monotonic() - max([awake_since, *written]) > limit)

    def _code(self, code: int) -> int:
        if code >= 0:
            self._end_rest()
            return code
        is_hung = time.monotonic() - self._last_written() > _SILENT_AT_END_SECONDS
        processes.end_descendants(os.getpid())
        self._status = None  # it was one of them
        if self._signals and not is_hung:
            return 128 + self._signals[0]
        what = "did not move any more" if is_hung else f"was killed by {signal.Signals(-code).name}"
        raise ServeError(f"the process that watches vLLM {what}; vLLM was ended")

    def _end_rest(self) -> None:
        """End what a keeper that has failed itself has left; what cannot be ended, it has named."""
        with suppress(ServeError):
            processes.end_descendants(os.getpid(), spare=self._status.pid if self._status else 0, limit=1.0)

    def _last_written(self) -> float:
        return max((report.get("alive", 0.0) for report in self.state.reports("keeper")), default=time.monotonic())

    def warn(self, message: str) -> None:
        """Print a warning, and show it on the status port."""
        errors.warn(message)
        self.reporter.warn(message)

    def fail(self, error: ExpoError) -> None:
        """Show an error on the status port."""
        self.reporter.fail(reason_of(error), line_of(error))
        self.reporter.enter("failed")

    def linger(self) -> None:
        """Leave a start that has failed on the status port until Prometheus has seen it; a signal ends that."""
        if self._status is None or self._signals or self._has_served():
            return
        failed = min(self._phases("failed"), default=time.monotonic())
        stop: list[int] = []
        for number in SIGNALS:
            take(number, lambda number, _: stop.append(number))
        began = time.monotonic()
        while not stop and time.monotonic() < began + _SHOWN_SECONDS and not self._is_scraped(failed):
            time.sleep(0.1)
            self._reap()

    def _has_served(self) -> bool:
        return bool(self._phases("serving"))

    def _phases(self, name: str) -> list[float]:
        """Return when a phase has begun, as the command and the keeper say."""
        reports = (*self.state.reports("command"), *self.state.reports("keeper"))
        return [report["phases"][name] for report in reports if name in report.get("phases", {})]

    def _is_scraped(self, since: float) -> bool:
        return any(report.get("scraped", 0.0) > since for report in self.state.reports("status"))


def take(number: int, handler: Any) -> None:
    """Handle a signal; a hangup that the caller ignores (``nohup``) is ignored here too."""
    if not (number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN):
        signal.signal(number, handler)


@contextmanager
def _end_of(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Give a descriptor that can be read once a process has ended; none where the system has none."""
    if not hasattr(os, "pidfd_open"):
        yield []
        return
    descriptor = os.pidfd_open(process.pid)
    try:
        yield [descriptor]
    finally:
        os.close(descriptor)


def _make_folder() -> str:
    """Make the folder for the sockets and files that vLLM leaves behind; in /tmp where the usual path is too long.

    Raises:
        ServeError: there is no place for it; without one vLLM would fail with a traceback of torch's or ZeroMQ's.
    """
    try:
        folder = tempfile.mkdtemp(prefix="expo-")
        if len(os.fsencode(folder)) > _MAX_FOLDER_BYTES:
            os.rmdir(folder)
            folder = tempfile.mkdtemp(prefix="expo-", dir=_SHORT_PLACE)
    except OSError as error:
        raise ServeError(
            f"vLLM needs a folder for its sockets and temporary files, and none can be made: {error.strerror} "
            f"({error.filename}); set TMPDIR to a folder of at most {_MAX_FOLDER_BYTES - len('/expo-12345678')} bytes "
            "that this user can write to"
        ) from None
    return folder


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONSAFEPATH": "1"}  # a folder named like the package must not shadow it


def listen(host: str, port: int) -> socket.socket:
    """Return the listening socket of the status port.

    Args:
        host: address or name; empty for all interfaces.
        port: from 1 to 65535.

    Raises:
        AddressError: it cannot be had.
    """
    is_ipv6 = ":" in host
    try:
        return socket.create_server(
            (host.strip("[]"), port),
            family=socket.AF_INET6 if is_ipv6 else socket.AF_INET,
            backlog=64,
            dualstack_ipv6=is_ipv6 and socket.has_dualstack_ipv6(),  # as vLLM's own port
        )
    except OSError as error:
        shown = host or "all interfaces"
        raise AddressError(
            f"--status-port: port {port} of {shown} cannot be had: {error.strerror or error}; choose another"
        ) from None
