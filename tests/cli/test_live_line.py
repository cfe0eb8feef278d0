"""The line below the log on a terminal: it is there while something starts, and never within the log."""

from __future__ import annotations

import os
import pty
import re
import threading
import time
from collections.abc import Iterator

import pytest

from expo_serve.cli import live_line
from expo_serve.cli.live_line import LiveLine, can_show
from expo_serve.cli.outlet import Outlet

TEXTS = ["starts vLLM for 1 s", "loads weights for 2 s", "x" * 500]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """What is read of a terminal, and what is written to it."""
    monkeypatch.setattr(live_line, "_TICK_SECONDS", 0.05)
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def screen(output: bytes) -> list[str]:
    """The lines that a terminal shows in the end."""
    lines = output.replace(b"\r\n", b"\n").decode().split("\n")
    return [re.split("\r\x1b\\[K", line)[-1] for line in lines]


def read(descriptor: int, until: bytes) -> bytes:
    """All output until some of it has come."""
    output = b""
    while until not in output:
        output += os.read(descriptor, 4096)
    return output


def test_it_stands_below_the_log_and_goes(terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    texts = iter([*TEXTS, *["warms up for 3 s"] * 1000])
    turn = threading.Lock()
    line = LiveLine(theirs, turn, lambda: next(texts))
    outlet = Outlet(theirs, turn, before=line.clear)
    line.start([outlet])
    output = read(ours, b"warms up")
    assert b"x" * 79 in output
    assert b"x" * 80 not in output  # no wider than the terminal
    for number in range(5):
        outlet.put(f"log line {number}\n".encode())
        time.sleep(0.12)
    output += read(ours, b"4\r\n")
    output += read(ours, b"warms up")
    assert screen(output)[-1] == "warms up for 3 s"
    line.end()
    outlet.put(b"the end\n")
    output += read(ours, b"end\r\n")
    assert screen(output) == [*(f"log line {number}" for number in range(5)), "the end", ""]


def test_it_is_not_drawn_within_a_line(terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    turn = threading.Lock()
    line = LiveLine(theirs, turn, lambda: "live")
    outlet = Outlet(theirs, turn, before=line.clear)
    outlet.put(b"a bar: 10%")
    output = read(ours, b"10%")
    line.start([outlet])
    time.sleep(0.2)
    outlet.put(b"\ra bar: 20%")
    output += read(ours, b"20%")
    assert b"live" not in output
    outlet.put(b"\n")
    output += read(ours, b"live")
    line.end()


def test_it_ends_by_itself(terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    texts = iter(["starts", None])
    line = LiveLine(theirs, threading.Lock(), lambda: next(texts))
    line.start([])
    assert screen(read(ours, b"starts") + read(ours, b"\x1b[K"))[-1] == ""


def test_where_it_is_shown(terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert can_show(terminal[1])
    monkeypatch.setenv("TERM", "dumb")
    assert not can_show(terminal[1])
    monkeypatch.delenv("TERM")
    assert not can_show(terminal[1])
    with open(os.devnull) as file:
        assert not can_show(file.fileno())
