"""Whether a fault has happened."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

from loadtests.chaos.victim import Victim

_ROLE_SECONDS = 60.0


class NoEffect(Exception):
    """The fault did not happen; the message says why."""


def process_of(victim: Victim, role: str) -> psutil.Process:
    """Return a process, which a start may have yet to make.

    Raises:
        NoEffect: it never came.
    """
    wait_until(lambda: role in victim.roles() or not victim.is_alive(), _ROLE_SECONDS, f"there is no process {role}")
    try:
        return victim.roles()[role]
    except KeyError:
        raise NoEffect(f"the server ended before there was a process {role}") from None


def wait_until(happens: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Wait for something.

    Raises:
        NoEffect: it did not happen in time; ``otherwise`` is the message.
    """
    deadline = time.monotonic() + seconds
    while not happens():
        if time.monotonic() > deadline:
            raise NoEffect(otherwise)
        time.sleep(0.1)
