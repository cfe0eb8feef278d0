"""What a load says while it goes on: a bar on a terminal, lines elsewhere, a warning when storage is silent."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from expo_serve.load.counts import ReadActivity
from expo_serve.vllm_plugin import progress as module
from expo_serve.vllm_plugin.progress import LoadProgress


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged; everything goes a hundred times as fast."""
    found: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            module.logger, level, lambda text, *given, level=level: found.append(f"{level}: {text % given}")
        )
    monkeypatch.setattr(LoadProgress, "tick_seconds", 0.005)
    monkeypatch.setattr(LoadProgress, "line_seconds", 0.1)
    monkeypatch.setattr(LoadProgress, "silent_seconds", 0.3)
    return found


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_lines_say_how_far_how_fast_and_how_long(lines: list[str]) -> None:
    activity = ReadActivity()
    with LoadProgress(4_000_000_000, activity, on_terminal=False, is_shown=True) as progress:
        progress.advance(1_000_000_000)
        activity.add_bytes(1_200_000_000)
        until(lambda: len(lines) > 1)
    assert lines[0].startswith("info: expo: loading weights: 25% after 0 s, 1.2 GB read at ")
    assert lines[0].endswith(" s left")
    assert " MB/s, about " in lines[0]


def test_a_short_load_says_nothing(lines: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with LoadProgress(4, ReadActivity(), on_terminal=False, is_shown=True) as progress:
        progress.advance(4)
    assert lines == []
    assert capfd.readouterr().err == ""


def test_a_terminal_gets_a_bar_with_bytes_rate_and_time_left(
    lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with LoadProgress(4_000_000_000, ReadActivity(), on_terminal=True, is_shown=True) as progress:
        progress.advance(1_000_000_000)
        until(lambda: "25%" in capsys.readouterr().err)
        time.sleep(0.2)
    drawn = capsys.readouterr().err
    assert "expo: loading weights: 100%" in drawn
    assert "4.00G/4.00G" in drawn
    assert "B/s]" in drawn
    assert lines == []


def test_a_bar_of_a_load_that_failed_stays_where_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    progress = LoadProgress(4_000_000_000, ReadActivity(), on_terminal=True, is_shown=True)
    progress.__enter__()
    progress.advance(1_000_000_000)
    progress.__exit__(ArithmeticError)
    assert "25%" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("on_terminal", [True, False])
def test_other_ranks_only_warn(lines: list[str], capsys: pytest.CaptureFixture[str], on_terminal: bool) -> None:
    activity = ReadActivity()
    activity.reading[1] = ((Path("/models/slow.safetensors"),), time.monotonic())
    activity.reading[2] = ((Path("/models/quick.safetensors"),), time.monotonic() + 5)
    with LoadProgress(4, activity, on_terminal=on_terminal, is_shown=False):
        until(lambda: len(lines) > 1)
    assert lines[0].startswith("warning: expo: nothing has come from /models/slow.safetensors for 0 s")
    assert all(line.startswith("warning: expo: nothing has come from /models/slow.safetensors") for line in lines)
    assert capsys.readouterr().err == ""


def test_reads_that_come_are_no_silence(lines: list[str]) -> None:
    activity = ReadActivity()
    with LoadProgress(4, activity, on_terminal=False, is_shown=False):
        for _ in range(10):
            activity.reading[1] = ((Path("/models/slow.safetensors"),), time.monotonic())
            time.sleep(0.05)
    assert lines == []
