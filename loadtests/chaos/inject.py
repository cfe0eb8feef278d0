"""How each fault is done, and undone: context managers that take the server and the fault.

The fault lasts while the block runs. Each one sees to it that it has had its effect, else it raises
:class:`NoEffect`: a fault that did not happen proves nothing. One that takes its time before it strikes gives the
moment.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

import httpx
import psutil

from loadtests.chaos import outside, starve
from loadtests.chaos.effects import process_of
from loadtests.chaos.faults import Kind
from loadtests.chaos.victim import Victim

_UNREAD_BYTES, _LINE_BYTES = 1 << 20, 50_000

Injector = Callable[[Victim, Kind], AbstractContextManager[float | None]]


@contextmanager
def kill(victim: Victim, kind: Kind) -> Iterator[None]:
    """Kill a process."""
    process_of(victim, kind.target).kill()
    yield


@contextmanager
def stop(victim: Victim, kind: Kind) -> Iterator[None]:
    """Stop a process, as a hang in a driver would; then let it go on, if it is still there."""
    process = process_of(victim, kind.target)
    process.suspend()
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.resume()


@contextmanager
def send_signal(victim: Victim, kind: Kind) -> Iterator[None]:
    """Send the command a signal."""
    victim.process.send_signal(signal.Signals[kind.target])
    yield


@contextmanager
def send_signal_twice(victim: Victim, kind: Kind) -> Iterator[None]:
    """Send the command a signal, and again a second later."""
    victim.process.send_signal(signal.Signals[kind.target])
    time.sleep(1.0)
    victim.process.send_signal(signal.Signals[kind.target])
    yield


@contextmanager
def send_signal_unread(victim: Victim, kind: Kind) -> Iterator[float]:
    """Send the command a signal while nobody reads its log; what it has to say is read in the end."""
    with stall_log(victim, kind):
        _log_much(victim)
        struck = time.monotonic()
        victim.process.send_signal(signal.Signals[kind.target])
        with suppress(subprocess.TimeoutExpired):
            victim.process.wait(kind.promise.ending.seconds if kind.promise.ending else None)
    yield struck


@contextmanager
def stall_log(victim: Victim, kind: Kind) -> Iterator[None]:
    """Read nothing of the log, and let the server write more than pipes hold."""
    assert victim.place.pipe is not None
    victim.place.pipe.stall()
    try:
        _log_much(victim)
        yield
    finally:
        victim.place.pipe.go_on()


def _log_much(victim: Victim) -> None:
    """Ask for what lands in the access log, a megabyte of it."""
    text = "a" * _LINE_BYTES
    with httpx.Client(base_url=victim.url, timeout=20) as client:
        for _ in range(_UNREAD_BYTES // _LINE_BYTES):
            client.get(f"/version?{text}")


INJECTORS: dict[str, Injector] = {
    "kill": kill,
    "stop": stop,
    "signal": send_signal,
    "signal_twice": send_signal_twice,
    "signal_unread": send_signal_unread,
    "stall_log": stall_log,
    "eat_memory": starve.eat_memory,
    "limit_memory": starve.limit_memory,
    "fill_disk": starve.fill_disk,
    "fill_shm": starve.fill_shm,
    "limit_files": starve.limit_files,
    "set_clock": outside.set_clock,
    "cut_network": outside.cut_network,
    "truncate": outside.truncate,
    "spoil_values": outside.spoil_values,
    "replace_header": outside.replace_header,
}
