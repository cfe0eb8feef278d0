"""The catalogue of faults, and what expo-serve promises for each of them.

A fault strikes a server that serves, or a start. After a fault that the server survives the next one can follow; one
that ends it comes last.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from typing import Literal, get_args

from loadtests.chaos.outcomes import Outcome

ENGINE_TIMEOUT = 10.0
"""--engine-timeout of the servers, in seconds: short, so that hangs are noticed within a test."""
SHUTDOWN_TIMEOUT = 5.0
"""Seconds that the drain lasts by default."""
RECOVERY_SECONDS = 8.0
"""After the end of a fault; the server then answers a new request."""
END_SECONDS = 25.0
"""From the death of a process to the end of all: 10 s for vLLM to end by itself, 10 s to kill what is left, and 5 s."""
REPORT_SECONDS = 22.0
"""A start that failed stays visible on the status port so long, if nobody reads it."""
_KEEPER_SECONDS = 30.0
"""After which a keeper that does not move is given up."""
NOTICE_SECONDS = 5.0
"""A hang is noticed so long after the engine timeout at the latest."""

AT_REST = "SIGTERM at rest"
"""Ends every life that no other fault has ended: without any client."""

Port = Literal["health", "ready"]
"""What says whether requests should be sent: ``/health`` of the server, ``/ready`` of the status port."""
PORTS: tuple[Port, ...] = get_args(Port)
When = Literal["before", "start", "serving"]
"""Before the command is started, while it starts, while it serves."""

_BOTH: frozenset[Port] = frozenset({"health", "ready"})
_STATUS: frozenset[Port] = frozenset({"ready"})
_HEALTH: frozenset[Port] = frozenset({"health"})
_NONE: frozenset[Port] = frozenset()
_WHOLE = frozenset({Outcome.COMPLETE})
_LATE = _WHOLE | {Outcome.BUSY}
_ANY_END = frozenset(Outcome) - {Outcome.UNEXPECTED, Outcome.LEFT, Outcome.SILENT}
_DRAINED = frozenset({Outcome.COMPLETE, Outcome.CUT_WITH_EVENT, Outcome.BUSY, Outcome.REFUSED})


@dataclass(frozen=True)
class Ending:
    """How a server has to end.

    Args:
        codes: exit codes that are right.
        seconds: from the fault to the end of all processes.
        line: what the last line of the log has to match; None where nobody is left to print it.
        reason: ``error.reason`` on the status port, where it can still be read.
    """

    codes: tuple[int, ...]
    seconds: float
    line: str | None
    reason: str | None = None


@dataclass(frozen=True)
class Promise:
    """What has to hold, whatever else happens.

    Args:
        clients: outcomes that clients may see.
        ending: how the server ends; None if it must not.
        recovery: seconds after the end of the fault within which a new request is answered; None if it need not be.
            With an ending too, one of both is enough.
        unready: seconds from the beginning of the fault within which ``/ready`` must say no, and ``/health`` must not
            say yes; None if both must say yes all the time, but for what may fail.
        may_fail: ports that may say no or be silent without having to.
        must_see: outcomes that some client has to see.
    """

    clients: frozenset[Outcome]
    ending: Ending | None = None
    recovery: float | None = None
    unready: float | None = None
    may_fail: frozenset[Port] = frozenset()
    must_see: frozenset[Outcome] = frozenset()


@dataclass(frozen=True)
class Kind:
    """One kind of fault.

    Args:
        name: unique.
        injector: name of the function in ``loadtests.chaos.inject`` that does it.
        target: what it is done to: a process, a signal, a file.
        promise: what has to hold.
        when: what it strikes.
        holds: from how many to how many seconds it lasts; the plan chooses.
        delays: from how many to how many seconds pass before it, serving or starting.
        needs: surroundings (``loadtests.chaos.surroundings``).
    """

    name: str
    injector: str
    target: str
    promise: Promise
    when: When = "serving"
    holds: tuple[float, float] = (0.0, 0.0)
    delays: tuple[float, float] = (1.0, 4.0)
    needs: frozenset[str] = frozenset()

    @property
    def is_last(self) -> bool:
        """Whether a server cannot go on after it."""
        return self.when != "serving" or self.promise.recovery is None


_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_NO_MEMORY = r"(?i)out of memory|\bOOM\b"
_NO_SHM = r"(?i)bus error|SIGBUS|no space left|shared memory|/dev/shm"
_FILE = r"model\.safetensors"
_SERVERS = {"api": "server", "engine": "VLLM::EngineCore", "worker": "VLLM::Worker"}
"""Processes that only vLLM has, and how a message names them."""


def _goes_on(may_fail: frozenset[Port] = _NONE) -> Promise:
    return Promise(_WHOLE, recovery=RECOVERY_SECONDS, may_fail=may_fail)


def _dies(code: int, line: str | None, reason: str | None = None) -> Promise:
    return Promise(_ANY_END, Ending((code,), END_SECONDS, line, reason), may_fail=_BOTH)


def _killed() -> list[Kind]:
    """A process is killed while it serves."""
    promises = {
        "command": _dies(-signal.SIGKILL, None),
        "keeper": _dies(1, "the process that watches vLLM was killed by SIGKILL"),
        "api": _dies(1, "server was killed by SIGKILL"),
        "engine": _dies(1, "VLLM::EngineCore", "died"),
        "worker": _dies(1, "VLLM::Worker", "died"),
        "status": _goes_on(_STATUS),
    }
    return [Kind(f"kill {target}", "kill", target, promise) for target, promise in promises.items()]


def _stopped() -> list[Kind]:
    """A process is stopped: for less than the engine timeout, for longer, and for longer than twice of it."""
    brief, longer = (0.3 * ENGINE_TIMEOUT, 0.6 * ENGINE_TIMEOUT), (1.3 * ENGINE_TIMEOUT, 1.5 * ENGINE_TIMEOUT)
    forever = 2 * ENGINE_TIMEOUT + END_SECONDS
    kinds = []
    for target, name in _SERVERS.items():
        noticed = Promise(_LATE, recovery=RECOVERY_SECONDS, unready=ENGINE_TIMEOUT + NOTICE_SECONDS)
        hung = Ending((1,), forever, rf"{name}.*(hung|answer)|(hung|answer).*{name}", "hung")
        ended = Promise(_ANY_END, hung, unready=ENGINE_TIMEOUT + NOTICE_SECONDS)
        kinds += [
            Kind(
                f"stop {target} briefly", "stop", target, _goes_on(_HEALTH if target == "api" else _NONE), holds=brief
            ),
            Kind(f"stop {target} longer", "stop", target, noticed, holds=longer),
            Kind(f"stop {target} for good", "stop", target, ended, holds=(forever, forever)),
        ]
    for target in ("command", "keeper", "status"):
        promise = _goes_on(_STATUS if target == "status" else _NONE)
        kinds += [
            Kind(f"stop {target} briefly", "stop", target, promise, holds=brief),
            Kind(f"stop {target} longer", "stop", target, promise, holds=(2.1 * ENGINE_TIMEOUT, 2.4 * ENGINE_TIMEOUT)),
        ]
    gone = _KEEPER_SECONDS + END_SECONDS
    given_up = Promise(_ANY_END, Ending((1,), gone, "watches vLLM did not move"), may_fail=_BOTH)
    return [*kinds, Kind("stop keeper for good", "stop", "keeper", given_up, holds=(gone, gone))]


def _signalled() -> list[Kind]:
    """The command gets a signal that asks it to end, with open streams."""
    drain = Ending((0,), SHUTDOWN_TIMEOUT + 10, None)
    drained = Promise(_DRAINED, drain, unready=2.0, must_see=frozenset({Outcome.BUSY}))
    again = Promise(_ANY_END, Ending((128 + signal.SIGTERM,), 10, None), may_fail=_BOTH)
    unread = Promise(_DRAINED, Ending((0,), SHUTDOWN_TIMEOUT + 15, None), unready=2.0)
    return [
        *(Kind(f"{number.name} with streams", "signal", number.name, drained) for number in _SIGNALS),
        Kind(AT_REST, "signal", "SIGTERM", Promise(frozenset(), drain, unready=2.0)),
        Kind("SIGTERM twice", "signal_twice", "SIGTERM", again),
        Kind("SIGTERM with a log that nobody reads", "signal_unread", "SIGTERM", unread, needs=frozenset({"pipe"})),
    ]


def _starved() -> list[Kind]:
    """Something that the server needs runs out while it serves."""
    out_of_memory = Ending((1,), END_SECONDS + 10, _NO_MEMORY, "out_of_memory")
    no_room = Ending((1,), END_SECONDS, _NO_SHM)
    holds = (6.0, 12.0)
    return [
        Kind("memory limit", "eat_memory", "group", Promise(_ANY_END, out_of_memory, may_fail=_BOTH),
             holds=(30.0, 30.0), needs=frozenset({"memory"})),
        Kind("disk full", "fill_disk", "TMPDIR", _goes_on(), holds=holds, needs=frozenset({"disk"})),
        Kind("shared memory full", "fill_shm", "/dev/shm", Promise(_ANY_END, no_room, RECOVERY_SECONDS, None, _BOTH),
             holds=holds, needs=frozenset({"shm"})),
        Kind("no file descriptors", "limit_files", "api", Promise(_LATE | {Outcome.REFUSED, Outcome.CLOSED},
             recovery=RECOVERY_SECONDS, may_fail=_BOTH), holds=holds),
        Kind("log that nobody reads", "stall_log", "log", _goes_on(), holds=holds, needs=frozenset({"pipe"})),
    ]  # fmt: skip


def _outside() -> list[Kind]:
    """The world around the server changes."""
    changed = frozenset({"copies"})
    cut = Promise(_LATE | {Outcome.REFUSED}, recovery=RECOVERY_SECONDS, may_fail=_BOTH)
    return [
        Kind("clock an hour ahead", "set_clock", "+3600", _goes_on(), holds=(4, 8), needs=frozenset({"clock"})),
        Kind("clock an hour back", "set_clock", "-3600", _goes_on(), holds=(4, 8), needs=frozenset({"clock"})),
        Kind("network cut briefly", "cut_network", "link", cut, holds=(2.0, 5.0), needs=frozenset({"network"})),
        Kind("network cut longer", "cut_network", "link", cut, holds=(15.0, 25.0), needs=frozenset({"network"})),
        Kind("aligned truncated while serving", "truncate", "aligned", _goes_on(), holds=(3, 6), needs=changed),
        Kind("base truncated while serving", "truncate", "base", _goes_on(), holds=(3, 6), needs=changed),
        Kind("values changed while serving", "spoil_values", "aligned", _goes_on(), holds=(3, 6), needs=changed),
    ]


def _at_start() -> list[Kind]:
    """A start meets a fault."""
    late = END_SECONDS + REPORT_SECONDS

    def start(name: str, injector: str, target: str, ending: Ending) -> Kind:
        promise = Promise(_ANY_END, ending, may_fail=_BOTH)
        return Kind(f"{name} during the start", injector, target, promise, "start", delays=(0.5, 15.0))

    names = {"keeper": "was killed by SIGKILL", "api": "was killed by SIGKILL"}
    names |= {"engine": "EngineCore", "worker": "Worker"}  # before they have taken their titles too
    changed = Ending((1, 2), 60 + late, rf"{_FILE}|fingerprint|changed", "checkpoint")
    replaced = start("aligned replaced", "replace_header", "aligned", changed)
    return [
        *(start(number.name, "signal", number.name, Ending((128 + number, -number), 12, None)) for number in _SIGNALS),
        start("kill command", "kill", "command", Ending((-9,), END_SECONDS, None)),
        *(start(f"kill {role}", "kill", role, Ending((1,), late, line, "died")) for role, line in names.items()),
        replace(replaced, needs=frozenset({"copies"}), delays=(0.0, 0.0)),
    ]


def _before_start() -> list[Kind]:
    """A start finds a fault."""
    late = 150 + END_SECONDS + REPORT_SECONDS

    def before(name: str, injector: str, target: str, ending: Ending, need: str, recovery: float | None = None) -> Kind:
        promise = Promise(_ANY_END, ending, recovery, may_fail=_BOTH)
        return Kind(f"{name} before the start", injector, target, promise, "before", needs=frozenset({need}))

    memory = Ending((1,), late, _NO_MEMORY, "out_of_memory")
    truncated, spoilt = Ending((2,), late, _FILE, "checkpoint"), Ending((1,), late, "holds NaN or Inf", "values")
    return [
        before("memory limit", "limit_memory", "group", memory, "memory"),
        before("disk full", "fill_disk", "TMPDIR", Ending((1, 2), late, r"(?i)no space left"), "disk", late),
        before("shared memory full", "fill_shm", "/dev/shm", Ending((1, 2), late, _NO_SHM), "shm", late),
        before("aligned truncated", "truncate", "aligned", truncated, "copies"),
        before("NaN in aligned", "spoil_values", "aligned", spoilt, "copies"),
    ]


CATALOGUE: dict[str, Kind] = {
    kind.name: kind
    for kind in [
        *_killed(), *_stopped(), *_signalled(), *_starved(), *_outside(), *_at_start(), *_before_start()
    ]
}  # fmt: skip
