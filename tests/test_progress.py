"""What long work reports: a bar on a terminal, lines elsewhere, a warning when storage is silent."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expo_serve.load.counts import ReadActivity
from expo_serve.progress import Progress

GB = 1_000_000_000
SLOW, QUICK = (Path("/models/slow.safetensors"),), (Path("/models/quick.safetensors"),)


@pytest.fixture(autouse=True)
def _hundred_times_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Progress, "tick_seconds", 0.005)
    monkeypatch.setattr(Progress, "line_seconds", 0.1)
    monkeypatch.setattr(Progress, "silent_seconds", 0.3)


@pytest.fixture
def lines() -> list[str]:
    """What the progress made by :func:`start` has said."""
    return []


def start(lines: list[str], total: int, reads: ReadActivity | None = None, **settings: Any) -> Progress:
    """A progress whose lines and warnings are kept."""
    settings = {"on_terminal": False, **settings}
    progress = Progress("work", total, say=lines.append, warn=lambda line: lines.append(f"warning: {line}"), **settings)
    if reads:
        progress.watch(reads)
    return progress


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_lines_say_how_far_how_fast_and_how_long(lines: list[str]) -> None:
    with start(lines, 4 * GB) as progress:
        progress.advance(GB)
        until(lambda: len(lines) > 1)
    assert lines[0].startswith("work: 25% after 0 s, 1.0 GB done at ")
    assert lines[0].endswith(" s left")
    assert " MB/s, about " in lines[0]


def test_lines_count_what_was_read_where_reads_are_watched(lines: list[str]) -> None:
    reads = ReadActivity()
    with start(lines, 4 * GB, reads) as progress:
        progress.advance(GB)
        reads.add_bytes(GB // 5)
        until(lambda: lines)
    assert lines[0].startswith("work: 25% after 0 s, 0.2 GB read at ")


class _Ticks:
    """In the place of the event that ends the thread: lets it look so many times."""

    def __init__(self, count: int, before: Callable[[], None]) -> None:
        self._left, self._before = count, before

    def wait(self, timeout: float) -> bool:
        self._before()
        self._left -= 1
        return self._left < 0


@pytest.fixture
def four_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real intervals, and a clock that is four seconds further at each look."""
    monkeypatch.undo()
    clock = iter(range(100, 10**6, 4))
    monkeypatch.setattr("expo_serve.progress.time.monotonic", lambda: float(next(clock)))


def look(progress: Progress, times: int, before: Callable[[], None]) -> None:
    """Do what the thread does, in this one."""
    progress._ended = _Ticks(times, before)  # type: ignore[assignment]
    progress._run()


@pytest.mark.usefixtures("four_seconds")
def test_a_line_comes_every_ten_seconds(lines: list[str]) -> None:
    progress = start(lines, 4 * GB)
    look(progress, 10, lambda: progress.advance(GB // 10))
    assert lines == [
        "work: 8% after 12 s, 0.3 GB done at 25 MB/s, about 148 s left",
        "work: 15% after 24 s, 0.6 GB done at 25 MB/s, about 136 s left",
        "work: 22% after 36 s, 0.9 GB done at 25 MB/s, about 124 s left",
    ]


@pytest.mark.usefixtures("four_seconds")
@pytest.mark.parametrize("comes", [True, False])
def test_only_reads_that_do_not_come_are_silence(lines: list[str], comes: bool) -> None:
    reads = ReadActivity()
    progress = start(lines, 4, reads, is_shown=False)
    reads.reading[1] = SLOW, time.monotonic()

    def read_again() -> None:
        if comes:
            reads.reading[1] = SLOW, time.monotonic()

    look(progress, 20, read_again)
    assert bool(lines) != comes
    assert all(line.startswith("warning: no data from /models/slow.safetensors for ") for line in lines)


@pytest.mark.usefixtures("four_seconds")
def test_a_terminal_gets_no_lines(lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    progress = start(lines, 4 * GB, on_terminal=True)
    look(progress, 20, lambda: progress.advance(GB // 10))
    progress._bar.close()
    assert "50%" in capsys.readouterr().err
    assert lines == []


def test_nothing_done_promises_nothing(lines: list[str]) -> None:
    with start(lines, 4 * GB):
        until(lambda: lines)
    assert lines[0].startswith("work: 0% after 0 s, 0.0 GB done at ")
    assert "left" not in lines[0]


def test_short_work_says_nothing(lines: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with start(lines, 4) as progress:
        progress.advance(4)
    assert lines == []
    assert capfd.readouterr().err == ""


def test_without_a_writer_lines_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    reads = ReadActivity()
    reads.reading[1] = SLOW, time.monotonic() - 60
    printed = ""

    def has_both() -> bool:
        nonlocal printed
        printed += capsys.readouterr().err
        return "work: 0% after" in printed and "warning" in printed

    with Progress("work", GB, on_terminal=False) as progress:
        progress.watch(reads)
        until(has_both)
    assert "\nexpo-serve: warning: no data from /models/slow.safetensors for 60 s; " in f"\n{printed}"


def test_a_terminal_gets_a_bar_with_bytes_rate_and_time_left(
    lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with start(lines, 4 * GB, on_terminal=True) as progress:
        progress.advance(GB)
        until(lambda: "25%" in capsys.readouterr().err)
    drawn = capsys.readouterr().err
    assert "work: 100%" in drawn
    assert "4.00G/4.00G" in drawn
    assert "B/s]" in drawn


def test_a_bar_of_work_that_failed_stays_where_it_was(lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    progress = start(lines, 4 * GB, on_terminal=True)
    progress.__enter__()
    progress.advance(GB)
    progress.__exit__(ArithmeticError)
    assert "25%" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("on_terminal", [True, False])
def test_other_ranks_only_warn(lines: list[str], capsys: pytest.CaptureFixture[str], on_terminal: bool) -> None:
    reads = ReadActivity()
    reads.reading[1] = SLOW, time.monotonic()
    reads.reading[2] = QUICK, time.monotonic() + 5
    with start(lines, 4, reads, on_terminal=on_terminal, is_shown=False):
        until(lambda: len(lines) > 1)
    assert all(line.startswith("warning: no data from /models/slow.safetensors for ") for line in lines)
    assert capsys.readouterr().err == ""
