"""Carries a plan out: starts each server, does its faults, and judges what was seen."""

from __future__ import annotations

import math
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import httpx

from loadtests.chaos.effects import NoEffect
from loadtests.chaos.faults import AT_REST, PORTS, Kind, Port
from loadtests.chaos.inject import INJECTORS
from loadtests.chaos.judge import Seen, judge
from loadtests.chaos.outcomes import Answer, Outcome
from loadtests.chaos.plan import Fault, Life
from loadtests.chaos.streams import Streams, steady
from loadtests.chaos.surroundings import Impossible, place_for, why_not
from loadtests.chaos.victim import MODEL, Victim
from loadtests.chaos.watch import Watch

CLIENTS = 6
_READY_SECONDS = 480.0
_TICK_SECONDS = 0.1
_OTHERS_SECONDS = 20.0
_CLOSING_SECONDS = 1.0

Verdict = Literal["kept", "broken", "not possible here", "no effect", "not reached"]


@dataclass
class Result:
    """What came of one fault of a plan."""

    fault: Fault
    life: int
    verdict: Verdict
    why: list[str] = field(default_factory=list)
    """How the promise was broken, or why the fault could not be done."""
    seen: Seen | None = None


class Run:
    """One run of a plan.

    Args:
        work: an empty folder; the logs of lives with a broken promise stay in it.
        seed: of what the clients ask.
        tell: is told of each result.
    """

    def __init__(self, work: Path, seed: int, tell: Callable[[Result], None]) -> None:
        self._work, self._seed, self._tell = work, seed, tell
        self._reference: list[str] | None = None
        self._servers = 0
        self._lacks: dict[str, str] = {}
        self.results: list[Result] = []

    def carry_out(self, lives: Sequence[Life], first: int = 1) -> list[Result]:
        """Do all of it; returns a result for each fault, in the order in which they came.

        Args:
            lives: of the plan.
            first: the number of the first one.
        """
        for number, life in enumerate(lives, first):
            left = [fault for fault in life.faults if self._is_possible(number, fault)]
            while left:
                left = self._live(number, left)
        return self.results

    def _live(self, number: int, faults: list[Fault]) -> list[Fault]:
        """Do as many of the faults as one server survives; returns the others."""
        try:
            return self._serve(number, faults) if faults[0].what.when == "serving" else self._start(number, faults)
        except Impossible as error:
            for fault in faults:
                self._note(Result(fault, number, "not possible here", [str(error)]))
            return []

    def _is_possible(self, life: int, fault: Fault) -> bool:
        needs = fault.what.needs
        for need in sorted(needs - self._lacks.keys()):
            self._lacks[need] = why_not(frozenset({need}), self._work / "try")
        if lacks := [self._lacks[need] for need in sorted(needs) if self._lacks[need]]:
            self._note(Result(fault, life, "not possible here", lacks))
        return not lacks

    def _note(self, result: Result) -> None:
        self.results.append(result)
        self._tell(result)

    def _serve(self, number: int, faults: list[Fault]) -> list[Fault]:
        """Start a server and do as many of the faults as it survives; returns the others."""
        needs = frozenset[str]().union(*(fault.what.needs for fault in faults))
        with ExitStack() as stack:
            victim = self._victim(stack, needs)
            victim.start()
            if trouble := self._ready(victim):
                for fault in faults:
                    self._note(Result(fault, number, "not reached", [trouble]))
                self._keep_log(victim, number)
                return []
            watch = stack.enter_context(Watch(victim))
            streams = stack.enter_context(Streams(victim.url, steady(MODEL, CLIENTS), self._seed + number))
            done = 0
            while victim.is_alive() and done < len(faults):
                self._strike(victim, faults[done], number, streams, watch)
                done += 1
            if victim.is_alive():
                self._strike(victim, Fault(AT_REST, 0.0, 0.0), number, streams, watch)
        return faults[done:]

    def _victim(self, stack: ExitStack, needs: frozenset[str]) -> Victim:
        self._servers += 1
        folder = self._work / str(self._servers)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        victim = Victim(stack.enter_context(place_for(needs, folder)), self._servers)
        stack.callback(victim.kill_all)
        return victim

    def _ready(self, victim: Victim) -> str:
        """Wait until a server serves and answers as the first one did; returns what went wrong."""
        try:
            victim.wait_ready(_READY_SECONDS)
            answers = victim.answers()
        except (AssertionError, httpx.HTTPError) as error:
            return f"the server did not start ({type(error).__name__}); its last line: {victim.last_line()}"
        self._reference = self._reference or answers
        wrong = _differing(answers, self._reference)
        return f"{wrong} greedy answers of a new server are not those of the first" if wrong else ""

    def _strike(self, victim: Victim, fault: Fault, number: int, streams: Streams, watch: Watch) -> None:
        """Do one fault to a server under streams, and judge what came of it."""
        kind = fault.what
        if fault.kind != AT_REST:
            streams.go_on()
            time.sleep(fault.delay)
        victim.living()  # so that they are known when they are orphans
        began = time.monotonic()
        try:
            with INJECTORS[kind.injector](victim, kind) as struck:
                began = struck or began
                _hold(victim, kind, fault.holds)
        except NoEffect as error:
            streams.pause()
            self._note(Result(fault, number, "no effect", [str(error)]))
            return
        seen = self._recovered(victim, kind) if victim.is_alive() else Seen()
        over = time.monotonic()
        if not victim.is_alive() or (kind.promise.recovery is None and self._ends_late(victim)):
            seen = self._ended(victim, began)
            over = time.monotonic()
        seen.still_open, seen.reason = not streams.pause(), watch.reason
        seen.no_seconds = {port: _first_no(watch, port, began, over) for port in PORTS}
        _count(seen, kind, streams, began)
        if not seen.still_open:  # answers that are computed together with others are rounded otherwise
            self._compare(victim, seen)
        self._judge(victim, fault, number, seen)

    def _recovered(self, victim: Victim, kind: Kind) -> Seen:
        """Wait until a server answers again, for three times as long as it may take."""
        seen, began = Seen(), time.monotonic()
        while kind.promise.recovery and victim.is_alive() and time.monotonic() < began + 3 * kind.promise.recovery:
            if victim.serves():
                seen.recovery_seconds = time.monotonic() - began
                break
            time.sleep(_TICK_SECONDS)
        return seen

    def _ends_late(self, victim: Victim) -> bool:
        """Return whether a server that should have ended does so soon; else it is killed after this."""
        try:
            victim.process.wait(10)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _ended(self, victim: Victim, began: float) -> Seen:
        """Wait for the end of the command and of all that it has started, and look at what is left."""
        code = victim.process.wait()
        seconds = time.monotonic() - began
        deadline = time.monotonic() + _OTHERS_SECONDS
        while victim.living() and time.monotonic() < deadline:
            seconds = time.monotonic() - began
            time.sleep(_TICK_SECONDS)
        return Seen(code=code, end_seconds=seconds, last_line=victim.last_line(), remains=victim.remains())

    def _compare(self, victim: Victim, seen: Seen) -> None:
        """Ask again what the first server was asked; what cannot be answered is no wrong answer."""
        if seen.recovery_seconds is None or self._reference is None:
            return
        try:
            answers = victim.answers()
        except httpx.HTTPError as error:
            seen.recovery_seconds = None
            seen.last_line = f"{type(error).__name__}"
            return
        seen.compared, seen.wrong = len(answers), _differing(answers, self._reference)

    def _judge(self, victim: Victim, fault: Fault, number: int, seen: Seen) -> None:
        broken = judge(fault.what.promise, seen)
        if broken:
            self._keep_log(victim, number)
            if seen.code is None and fault.what.promise.recovery is None:
                victim.kill_all()
        self._note(Result(fault, number, "broken" if broken else "kept", broken, seen))

    def _keep_log(self, victim: Victim, number: int) -> None:
        logs = self._work / "logs"
        logs.mkdir(exist_ok=True)
        shutil.copyfile(victim.log, logs / f"life-{number}.log")

    def _start(self, number: int, faults: list[Fault]) -> list[Fault]:
        """Start a server that meets a fault, or finds one."""
        fault, kind = faults[0], faults[0].what
        with ExitStack() as stack:
            victim = self._victim(stack, kind.needs)
            began = time.monotonic()
            try:
                with ExitStack() as lasting:
                    if kind.when == "before":
                        lasting.enter_context(INJECTORS[kind.injector](victim, kind))
                        began = time.monotonic()
                        victim.start()
                    else:
                        victim.start()
                        time.sleep(fault.delay)
                        if victim.state().get("phase") == "serving":
                            raise NoEffect("the server served already")
                        lasting.enter_context(INJECTORS[kind.injector](victim, kind))
                        began = time.monotonic()  # not before: its process may have had yet to come
                    reason = _hold_start(victim, kind)
            except NoEffect as error:
                self._note(Result(fault, number, "no effect", [str(error)]))
                return faults[1:]
            seen = self._recovered(victim, kind) if victim.is_alive() else self._ended(victim, began)
            seen.reason = reason
            self._compare(victim, seen)
            self._judge(victim, fault, number, seen)
        return faults[1:]


def _hold(victim: Victim, kind: Kind, seconds: float) -> None:
    """Let a fault last: as long as it is planned, or until the server has ended, as it has to."""
    if kind.promise.recovery is None and kind.promise.ending:
        seconds = max(seconds, kind.promise.ending.seconds)
    deadline = time.monotonic() + seconds
    while victim.is_alive() and time.monotonic() < deadline:
        time.sleep(_TICK_SECONDS)


def _hold_start(victim: Victim, kind: Kind) -> str | None:
    """Follow a start to its end, or until it serves where it may; returns the last reason that its state gave."""
    assert kind.promise.ending is not None
    reason, deadline = None, time.monotonic() + kind.promise.ending.seconds
    while victim.is_alive() and time.monotonic() < deadline:
        state = victim.state()
        reason = (state.get("error") or {}).get("reason", reason)
        if reason:
            victim.scrape()  # a failed start stays visible until then
        if state.get("phase") == "serving" and kind.promise.recovery is not None:
            break
        time.sleep(_TICK_SECONDS)
    return reason


def _first_no(watch: Watch, port: Port, began: float, over: float) -> float | None:
    noes = [look.at - began for look in watch.looks(port, began, over) if look.code != 200]
    return min(noes, default=None)


def _count(seen: Seen, kind: Kind, streams: Streams, began: float) -> None:
    answers = refused_at_the_end(streams.ended_since(began))
    seen.clients = Counter(answer.outcome for answer in answers)
    seen.unexpected = [answer.detail for answer in answers if answer.outcome not in kind.promise.clients]


def refused_at_the_end(answers: Sequence[Answer]) -> list[Answer]:
    """Return answers of which those are refusals that were closed as the port closed.

    A connection that waits in the queue of a port then is reset, a moment before new ones are refused.
    """
    closes = min((answer.began for answer in answers if answer.outcome is Outcome.REFUSED), default=math.inf)
    return [
        replace(answer, outcome=Outcome.REFUSED)
        if answer.outcome is Outcome.CLOSED and answer.ended > closes - _CLOSING_SECONDS
        else answer
        for answer in answers
    ]


def _differing(answers: Sequence[str], reference: Sequence[str]) -> int:
    return sum(one != other for one, other in zip(answers, reference, strict=True))
