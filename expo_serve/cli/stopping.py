"""How a server that serves is stopped: its requests end in peace, then vLLM ends."""

from __future__ import annotations

import signal
import subprocess
import time
from typing import Any

from expo_serve.errors import count_of, warn
from expo_serve.state.shared import SharedState

_CUT_SECONDS = 3.0
"""Time for the requests that are cut to end."""
STOP_SECONDS = 4.0
"""Time for vLLM to end after SIGTERM; then SIGTERM is sent again."""
WORKERS_STOP_SECONDS = 12.0
"""The same where vLLM has workers only: it gives them 5 s, and 4 s more after a SIGTERM, before it kills them."""
_STOP_AGAIN_SECONDS = 3.0
"""Time for vLLM to end after the second SIGTERM; then all of its processes are killed."""


class Stop:
    """One stop, from the first signal to the end of vLLM's server.

    Args:
        server: vLLM's API server.
        state: the command's shared memory, over which API servers are told to drain.
        drain_seconds: time for open requests (``--shutdown-timeout``); None to do without a drain, before serving.
        stop_seconds: time for vLLM to end after the first SIGTERM.
    """

    def __init__(
        self,
        server: subprocess.Popen[bytes],
        state: SharedState,
        drain_seconds: float | None,
        stop_seconds: float = STOP_SECONDS,
    ) -> None:
        self._server, self._state = server, state
        if drain_seconds is not None:
            state.draining = time.monotonic()
        self._began = time.monotonic()  # after that: a request that was let in before is in what is reported later
        self._drain_seconds, self._stop_seconds = drain_seconds, stop_seconds
        self._terminated = 0
        self._terminate_at = 0.0
        self.cut = 0
        """Requests that were cut."""

    @property
    def has_terminated(self) -> bool:
        """Whether vLLM has been told to end."""
        return self._terminated > 0

    @property
    def seconds(self) -> float:
        """Seconds since the first signal."""
        return time.monotonic() - self._began

    def go_on(self) -> bool:
        """Do what is due; returns whether vLLM is still given time to end."""
        now = time.monotonic()
        if self._terminated == 0:
            if self._is_drained(now):
                self._note_cut()
                self._terminate(now + self._stop_seconds)
        elif now > self._terminate_at:
            if self._terminated > 1:
                return False
            self._terminate(now + _STOP_AGAIN_SECONDS)
        return True

    def _terminate(self, next_time: float) -> None:
        self._terminated += 1
        self._terminate_at = next_time
        self._server.send_signal(signal.SIGTERM)

    def _is_drained(self, now: float) -> bool:
        """Return whether no request is open any more; those that are open for too long are told to end."""
        servers = self._state.reports("api")
        if self._drain_seconds is None or not servers:
            return True
        if self._state.cutting:
            return now > self._state.cutting + _CUT_SECONDS or _is_quiet(servers, self._state.cutting)
        if _is_quiet(servers, self._began):
            return True
        if now > self._began + self._drain_seconds:
            self._state.cutting = now
        return False

    def _note_cut(self) -> None:
        self.cut = sum(server.get("cut", 0) for server in self._state.reports("api"))
        if self.cut:
            warn(
                f"{count_of(self.cut, 'request was', 'requests were')} cut: still open {self._drain_seconds:g} s after "
                "the signal (--shutdown-timeout)"
            )


def _is_quiet(servers: list[dict[str, Any]], since: float) -> bool:
    """Return whether all API servers have said since a time that no request is open."""
    return all(server.get("reported", 0.0) > since and server.get("open") == 0 for server in servers)
