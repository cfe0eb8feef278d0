"""Notices that vLLM's engine hangs, says which process it is, and lets it show its stack."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from expo_serve.cli.awake import Awake
from expo_serve.errors import warn
from expo_serve.state.shared import SharedState

STACK_SIGNAL = signal.SIGUSR2
"""Upon which vLLM's processes write their stacks to the log (:func:`expo_serve.vllm_plugin.register`)."""
_STACK_SECONDS = 1.0
_ASLEEP_SECONDS = 6.0
"""Without a look: all processes have been frozen (a paused container), and the engine could not answer."""
_PY_SPY_SECONDS = 10.0
"""For all processes together."""
_STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "waits in the kernel", "Z": "has ended"}


class Hang(NamedTuple):
    """An engine that hangs."""

    cause: str
    """One line."""
    pids: list[int]
    """The processes that seem to be at fault."""


class Hanging:
    """Watches the answers of the engine that API servers report.

    Args:
        state: the command's shared memory.
    """

    def __init__(self, state: SharedState) -> None:
        self._state = state
        self._warned = False
        self._awake = Awake(_ASLEEP_SECONDS)

    def look(self, titles: Mapping[int, str]) -> Hang | None:
        """Return what hangs if the engine has been silent for twice ``--engine-timeout``.

        Args:
            titles: of vLLM's processes, by process id.
        """
        limit = self._state.engine_timeout
        silent = self._silent_seconds()
        if not limit or silent <= limit:
            self._warned = False
            return None
        if not self._warned:
            self._warned = True
            warn(
                f"vLLM's engine has not answered for {silent:.0f} s (--engine-timeout {limit:g}): "
                f"not ready; it is ended after {2 * limit:g} s"
            )
        if silent <= 2 * limit:
            return None
        suspects = self._suspects(titles)
        names = ", ".join(name for _, name in suspects)
        cause = f"vLLM's engine has not answered for {silent:.0f} s: {names} hung (--engine-timeout {limit:g})"
        return Hang(cause, [pid for pid, _ in suspects])

    def _silent_seconds(self) -> float:
        answered = [server["answered"] for server in self._state.reports("api") if "answered" in server]
        awake_since = self._awake.look()
        return time.monotonic() - max(min(answered), awake_since) if answered else 0.0

    def _suspects(self, titles: Mapping[int, str]) -> list[tuple[int, str]]:
        """Return the processes that seem to hang, with their names: those that are stopped before all others."""
        servers, ranks = self._state.reports("api"), self._state.reports("rank")
        all_titles = {server["pid"]: "vLLM's API server" for server in servers} | dict(titles)
        stopped = {pid: title for pid, title in all_titles.items() if _state(pid) in ("T", "t", "Z")}
        if not stopped:
            stopped = _silent(servers, ranks, all_titles, time.monotonic() - self._state.engine_timeout)
        return [(pid, f"{title} ({_described(pid)})") for pid, title in sorted(stopped.items())]


def _silent(
    servers: list[dict[str, Any]], ranks: list[dict[str, Any]], titles: Mapping[int, str], since: float
) -> dict[int, str]:
    """Return the processes from which nothing has come since a time, nearest to the clients first.

    An engine core that waits for a worker is silent too: where nothing tells which, all of them are returned.
    """
    if hung := [server["pid"] for server in servers if server.get("reported", 0.0) < since]:
        return {pid: titles[pid] for pid in hung}
    living = {rank["pid"] for rank in ranks if rank.get("alive", 0.0) > since}
    if any(server.get("core_answered", 0.0) > since for server in servers):
        living |= {pid for pid, title in titles.items() if "EngineCore" in title}
    others = {pid: title for pid, title in titles.items() if pid not in living | {server["pid"] for server in servers}}
    return others or dict(titles)


def _state(pid: int) -> str:
    """Return the letter of a process's state (proc_pid_stat(5)); Z where there is no process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def _described(pid: int) -> str:
    state = _STATES.get(_state(pid))
    return f"process {pid}, {state}" if state else f"process {pid}"


def show_stacks(pids: list[int]) -> None:
    """Have processes show their Python stacks in the log: by py-spy where it is installed, else by themselves.

    One that is stopped goes on for a moment; whoever calls this ends it.
    """
    py_spy = shutil.which("py-spy")
    give_up = time.monotonic() + _PY_SPY_SECONDS
    for pid in pids:
        if py_spy and _dump(py_spy, pid, give_up - time.monotonic()):
            continue
        with suppress(OSError):
            os.kill(pid, STACK_SIGNAL)
            os.kill(pid, signal.SIGCONT)
    time.sleep(_STACK_SECONDS)


def _dump(py_spy: str, pid: int, seconds: float) -> bool:
    with suppress(OSError, subprocess.SubprocessError):
        command = [py_spy, "dump", "--pid", str(pid)]
        found = subprocess.run(command, capture_output=True, text=True, timeout=max(0.0, seconds), check=True)
        warn(f"stack of process {pid}:\n{found.stdout}")
        return True
    return False
