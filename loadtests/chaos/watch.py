"""Asks a server all the time whether requests should be sent to it, as a load balancer and a kubelet do."""

from __future__ import annotations

import threading
from types import TracebackType

from loadtests.chaos.faults import PORTS, Port
from loadtests.chaos.victim import Look, Victim

_INTERVAL_SECONDS = 0.4


class Watch:
    """Asks both ports, each in a thread of its own, while the block runs; a third thread follows the state."""

    def __init__(self, victim: Victim) -> None:
        self._looks: dict[Port, list[Look]] = {port: [] for port in PORTS}
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(victim, port), daemon=True) for port in self._looks]
        self._threads.append(threading.Thread(target=self._follow, args=(victim,), daemon=True))
        self.reason: str | None = None
        """The last ``error.reason`` that the status port has shown."""

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()

    def looks(self, port: Port, since: float, until: float) -> list[Look]:
        """Return what was asked for between two moments of CLOCK_MONOTONIC."""
        return [look for look in self._looks[port] if since <= look.at <= until]

    def _follow(self, victim: Victim) -> None:
        while not self._ends.wait(_INTERVAL_SECONDS):
            self.reason = (victim.state().get("error") or {}).get("reason", self.reason)

    def _run(self, victim: Victim, port: Port) -> None:
        while not self._ends.wait(_INTERVAL_SECONDS):
            self._looks[port].append(victim.look(port))
