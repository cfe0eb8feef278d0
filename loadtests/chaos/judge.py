"""Compares what was seen with what was promised."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from expo_serve.errors import ERROR_PREFIX
from loadtests.chaos.faults import Ending, Port, Promise
from loadtests.chaos.outcomes import Outcome
from loadtests.chaos.victim import Remains


@dataclass
class Seen:
    """What was seen of one fault; seconds count from its beginning unless something else is said."""

    clients: Counter[Outcome] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    """Details of outcomes that are unexpected, or not allowed by the promise."""
    still_open: bool = False
    """Whether a client waited for something when all was over."""
    code: int | None = None
    """The exit code; None while the server lives."""
    end_seconds: float | None = None
    last_line: str = ""
    reason: str | None = None
    """``error.reason`` of the last state that could be read."""
    remains: Remains | None = None
    recovery_seconds: float | None = None
    """From the end of the fault until a new request was answered; None if none was."""
    no_seconds: dict[Port, float | None] = field(default_factory=dict)
    """When each port first said no, or nothing; None if it always said yes."""
    compared: int = 0
    wrong: int = 0
    """Greedy answers that were not those from before."""


def judge(promise: Promise, seen: Seen) -> list[str]:
    """Return how a promise was broken, a sentence for each; empty if it was kept."""
    return [*_ending(promise, seen), *_clients(promise, seen), *_ports(promise, seen), *_answers(seen)]


def _ending(promise: Promise, seen: Seen) -> Iterator[str]:
    if seen.code is None:
        if promise.recovery is None:
            seconds = promise.ending.seconds if promise.ending else 0
            yield f"the server did not end within {seconds:g} s"
        elif seen.recovery_seconds is None:
            yield "the server lives, and answers no new request"
        elif seen.recovery_seconds > promise.recovery:
            yield f"it answered {seen.recovery_seconds:.1f} s after the fault, not within {promise.recovery:g} s"
    elif promise.ending is None:
        yield f"the server ended with exit code {seen.code}: {seen.last_line}"
    else:
        yield from _end(promise.ending, seen)


def _end(ending: Ending, seen: Seen) -> Iterator[str]:
    if seen.code not in ending.codes:
        yield f"exit code {seen.code}, not {' or '.join(map(str, ending.codes))}: {seen.last_line}"
    if seen.end_seconds is not None and seen.end_seconds > ending.seconds:
        yield f"the end took {seen.end_seconds:.1f} s, not {ending.seconds:g}"
    if ending.line is not None and not seen.last_line.startswith(ERROR_PREFIX):
        yield f"the last line is no error: {seen.last_line}"
    elif ending.line is not None and not re.search(ending.line, seen.last_line):
        yield f"the last line does not name the cause ({ending.line}): {seen.last_line}"
    if seen.code == 0 and seen.last_line.startswith(ERROR_PREFIX):
        yield f"exit code 0 after an error: {seen.last_line}"
    if ending.reason and seen.reason and seen.reason != ending.reason:
        yield f"the status port gave the reason {seen.reason!r}, not {ending.reason!r}"
    if seen.remains:
        yield from _left(seen.remains)


def _left(remains: Remains) -> Iterator[str]:
    for what in ("processes", "segments", "sockets"):
        if left := getattr(remains, what):
            yield f"{len(left)} {what} left: {', '.join(left[:3])}"


def _clients(promise: Promise, seen: Seen) -> Iterator[str]:
    for outcome, count in seen.clients.items():
        if outcome not in promise.clients:
            yield f"{count} requests: {outcome} ({'; '.join(sorted(set(seen.unexpected))[:3])})"
    for outcome in promise.must_see - seen.clients.keys():
        yield f"no client saw: {outcome}"
    if seen.still_open:
        yield "a client still waited for its answer in the end"


def _ports(promise: Promise, seen: Seen) -> Iterator[str]:
    for port, seconds in seen.no_seconds.items():
        if promise.unready is None:
            if port not in promise.may_fail and seconds is not None:
                yield f"/{port} did not say yes {seconds:.1f} s after the beginning"
        elif seconds is None or seconds > promise.unready:
            when = "never said no" if seconds is None else f"said no only after {seconds:.1f} s"
            yield f"/{port} {when}, not within {promise.unready:g} s"


def _answers(seen: Seen) -> Iterator[str]:
    if seen.wrong:
        yield f"{seen.wrong} of {seen.compared} greedy answers are not those from before"
