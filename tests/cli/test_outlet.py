"""Output for a reader that stalls, reads slowly, goes away, or was never there: real pipes, terminals and files."""

from __future__ import annotations

import fcntl
import os
import pty
import socket
import termios
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from itertools import count
from pathlib import Path
from threading import Condition, Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expo_serve.cli.outlet import LIMIT_BYTES, Outlet
from tests.cli.pipes import NOTICE, PIPE_BYTES, STALLED, close, dropped, fill, lines, new_pipe, read_until

Pipe = tuple[int, int]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """A pipe that nobody reads yet."""
    with new_pipe() as ends:
        yield ends


def test_all_comes_out_unchanged_and_at_once(pipe: Pipe) -> None:
    outlet = Outlet(pipe[1])
    for part in (b"a line\n", b"no end", b"\r 50%", b"\x00\xff\x1b[31m", b"\n\n"):
        outlet.put(part)
        assert read_until(pipe[0], part) == part


def test_stalled_reader_costs_lines_that_are_counted_when_it_reads_again(pipe: Pipe) -> None:
    outlet = Outlet(pipe[1])
    held = fill(pipe[1])
    total = 100_000
    for first in range(0, total, 500):
        outlet.put(lines(500, first))
    began = time.monotonic()
    assert not outlet.finish(stalled=0.1, limit=20)
    assert time.monotonic() - began < 5
    output = read_until(pipe[0], STALLED + b"\n").removeprefix(held)
    (notice,) = NOTICE.finditer(output)
    kept = output[: notice.start()]
    assert kept == lines(len(kept) // 100)
    assert LIMIT_BYTES - 100 < len(kept) <= LIMIT_BYTES
    assert dropped(output) == total - len(kept) // 100
    outlet.put(b"it goes on\n")
    assert read_until(pipe[0], b"on\n") == b"it goes on\n"
    assert outlet.finish(stalled=1, limit=5)


def test_line_that_is_cut_ends_before_the_notice(pipe: Pipe) -> None:
    outlet = Outlet(pipe[1], limit=20)
    held = fill(pipe[1])
    outlet.put(b"whole\ncut he")
    outlet.put(b"re, and not shown\nneither\n")
    output = read_until(pipe[0], STALLED + b"\n").removeprefix(held)
    assert output == b"whole\ncut he\nexpo-serve: warning: 2 log lines (0.0 kB) were dropped" + STALLED + b"\n"


def test_after_a_loss_it_goes_on_with_a_whole_line(pipe: Pipe) -> None:
    outlet = Outlet(pipe[1], limit=30)
    held = fill(pipe[1])
    outlet.put(b"kept\n" + b"x" * 30 + b"\nthe beginning of one")
    output = read_until(pipe[0], STALLED + b"\n")
    outlet.put(b" and its end\nthe next one\n")
    output = (output + read_until(pipe[0], b"next one\n")).removeprefix(held)
    assert NOTICE.sub(b"", output) == b"kept\nthe next one\n"
    assert dropped(output) == 2


def test_one_notice_until_half_of_the_room_is_free(pipe: Pipe) -> None:
    """A reader that takes a line now and then is not told so after each of them."""
    outlet = Outlet(pipe[1], limit=40 * 100)
    held, output = fill(pipe[1]), b""
    for first in range(0, 200, 10):
        outlet.put(lines(10, first))
        output += os.read(pipe[0], 4096)  # one page: room for one page
        time.sleep(0.01)
    outlet.put(lines(1, 200))
    output = (output + read_until(pipe[0], lines(1, 200))).removeprefix(held)
    notices = len(NOTICE.findall(output))
    assert dropped(output) + output.count(b"\n") - notices == 201
    assert notices <= 10


chunks = st.lists(st.integers(1, 400), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=60), sizes=chunks, limit=st.integers(2, 3000))
def test_lines_come_whole_and_in_order_or_are_counted(lengths: list[int], sizes: list[int], limit: int) -> None:
    """Whatever the lines, the pieces in which they come, and the room. Only where a notice is may a line be cut."""
    given_lines = [b"<%d:%s>\n" % (number, b"x" * length) for number, length in enumerate(lengths)]
    text = b"".join(given_lines)
    with new_pipe() as (reader, writer):
        outlet = Outlet(writer, limit=limit)
        held = fill(writer)
        while text:
            outlet.put(text[: sizes[0]])
            text, sizes = text[sizes[0] :], [*sizes[1:], sizes[0]]
        outputs: list[bytes] = []
        thread = Thread(target=lambda: outputs.append(read_until(reader, b"#\n")))
        thread.start()
        assert outlet.finish(stalled=5, limit=10)
        outlet.put(b"#\n")
        thread.join()
    output = outputs[0].removeprefix(held).removesuffix(b"#\n")
    notices = len(NOTICE.findall(output))
    shown = [line for line in output.splitlines(keepends=True) if line.strip() and not NOTICE.match(line)]
    whole = [line for line in shown if line in given_lines]
    assert whole == [line for line in given_lines if line in whole]
    parts = [line.strip(b"\n") for line in shown if line not in given_lines]
    assert all(any(part in line for line in given_lines) for part in parts)
    assert len(parts) <= 2 * notices  # before one and after it
    assert abs(dropped(output) - (len(given_lines) - len(whole))) <= notices  # of a cut line there may be two parts


class FairLock(AbstractContextManager[None]):
    """A lock that goes to whoever has waited longest, as those of Python may and mostly do not."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._tickets, self._served = count(), 0

    def __enter__(self) -> None:
        with self._changed:
            ticket = next(self._tickets)
            self._changed.wait_for(lambda: self._served == ticket)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._served += 1
            self._changed.notify_all()


def test_two_outlets_into_one_file_tear_no_lines(pipe: Pipe) -> None:
    """Although what they are given ends within lines."""
    turn = FairLock()
    outlets = [Outlet(pipe[1], turn), Outlet(pipe[1], turn)]
    held, text = fill(pipe[1]), lines(7000)
    for begin in range(0, len(text), PIPE_BYTES):
        for outlet in outlets:
            outlet.put(text[begin : begin + PIPE_BYTES])
    output = bytearray()
    while len(output) < len(held) + 2 * len(text):
        output += os.read(pipe[0], PIPE_BYTES)
    found = output.removeprefix(held).splitlines(keepends=True)
    assert sorted(found) == sorted(2 * text.splitlines(keepends=True))


def test_slow_reader_gets_all(pipe: Pipe) -> None:
    """It is waited for as long as it reads, for much longer than the time after which it would count as stalled."""
    outlet = Outlet(pipe[1])
    held = fill(pipe[1])
    outlet.put(lines(1000))
    found = bytearray()

    def read() -> None:
        while len(found) < len(held) + 100_000:
            time.sleep(0.05)
            found.extend(os.read(pipe[0], 4096))

    thread = Thread(target=read)
    thread.start()
    began = time.monotonic()
    assert outlet.finish(stalled=0.5, limit=20)
    assert time.monotonic() - began > 0.5
    thread.join()
    assert found.removeprefix(held) == lines(1000)


def test_wait_for_a_slow_reader_ends(pipe: Pipe) -> None:
    outlet = Outlet(pipe[1])
    fill(pipe[1])
    outlet.put(lines(10_000))
    is_over: list[bool] = []

    def read() -> None:
        while not is_over:
            time.sleep(0.02)
            os.read(pipe[0], 4096)

    thread = Thread(target=read)
    thread.start()
    began = time.monotonic()
    assert not outlet.finish(stalled=2, limit=0.5)
    assert time.monotonic() - began < 1.5
    is_over.append(True)
    thread.join()


def test_reader_that_comes_back_is_told(tmp_path: Path) -> None:
    """A named pipe whose reader is gone, and then there is another."""
    name = tmp_path / "fifo"
    os.mkfifo(name)
    first = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(name, os.O_WRONLY)
    os.close(first)
    outlet = Outlet(writer)
    for number in range(3):
        outlet.put(b"lost %d\n" % number)
        assert not outlet.finish(stalled=5, limit=5)
    second = os.open(name, os.O_RDONLY)
    outlet.put(b"seen\n")
    output = read_until(second, b"seen\n")
    assert output == b"expo-serve: warning: 3 log lines (0.0 kB) were dropped: Broken pipe\nseen\n"
    close(second)
    close(writer)


def test_full_disk_costs_lines_and_no_time() -> None:
    writer = os.open("/dev/full", os.O_WRONLY)
    outlet = Outlet(writer)
    began = time.process_time()
    for first in range(0, 100_000, 1000):
        outlet.put(lines(1000, first))
    assert not outlet.finish(stalled=5, limit=5)
    time.sleep(0.3)
    assert time.process_time() - began < 1
    close(writer)


@pytest.mark.parametrize("kind", ["pipe", "terminal", "file", "socket"])
def test_nothing_about_the_open_file_is_changed(tmp_path: Path, kind: str) -> None:
    """Its flags belong to everybody who shares it, and so does how a terminal behaves."""
    with ExitStack() as stack:
        writer = other = -1
        if kind == "pipe":
            other, writer = stack.enter_context(new_pipe())
        elif kind == "terminal":
            other, writer = pty.openpty()
        elif kind == "file":
            writer = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
        else:
            other, writer = (end.detach() for end in socket.socketpair())
        before = (fcntl.fcntl(writer, fcntl.F_GETFL), termios.tcgetattr(writer) if kind == "terminal" else None)
        outlet = Outlet(writer)
        for first in range(0, 10_000, 100):
            outlet.put(lines(100, first))
        assert outlet.finish(stalled=0.1, limit=1) == (kind == "file")
        assert (fcntl.fcntl(writer, fcntl.F_GETFL), termios.tcgetattr(writer) if kind == "terminal" else None) == before
        close(other)
        close(writer)


@pytest.mark.parametrize("kind", ["terminal", "socket"])
def test_other_readers_than_those_of_pipes_are_told_too(kind: str) -> None:
    reader, writer = pty.openpty() if kind == "terminal" else (end.detach() for end in socket.socketpair())
    outlet = Outlet(writer)
    for first in range(0, 100_000, 1000):
        outlet.put(lines(1000, first))
    time.sleep(0.1)
    end = STALLED + (b"\r\n" if kind == "terminal" else b"\n")
    output = read_until(reader, end).replace(b"\r\n", b"\n")
    assert dropped(output) + output.count(b"\n") - 1 == 100_000
    close(reader)
    close(writer)


def test_open_file_that_somebody_else_has_made_non_blocking(pipe: Pipe) -> None:
    """Nothing is lost, and the wait takes no processor time."""
    os.set_blocking(pipe[1], False)
    outlet = Outlet(pipe[1])
    for first in range(0, 10_000, 100):
        outlet.put(lines(100, first))
    began = time.process_time()
    assert not outlet.finish(stalled=0.5, limit=1)
    assert time.process_time() - began < 0.2
    assert read_until(pipe[0], lines(1, 9_999)) == lines(10_000)


def test_many_small_parts_take_no_more_memory_than_large_ones(pipe: Pipe) -> None:
    outlet = Outlet(pipe[1], limit=1 << 16)
    fill(pipe[1])
    tracemalloc.start()
    try:
        for _ in range(1 << 16):
            outlet.put(b"x\n")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 18


def test_closed_target(pipe: Pipe) -> None:
    close(pipe[1])
    outlet = Outlet(pipe[1])
    outlet.put(b"a line\n")
    assert not outlet.finish(stalled=5, limit=5)
    outlet.put(b"x" * PIPE_BYTES)
    assert not outlet.finish(stalled=5, limit=5)
