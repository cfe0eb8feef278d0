"""The way of a block: each is tried, and the fastest is taken most often."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from expo_serve.load import ways
from expo_serve.load.ways import LEAST_BYTES, READ_PLAINLY, Way, Ways


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The processor time of this thread, in seconds, as its only element."""
    now = [0.0]
    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    return now


def taken(chooser: Ways, clock: list[float], cost: dict[Way, float], blocks: int) -> Counter[Way]:
    """Let blocks go the ways that are chosen, each with its cost."""
    found: Counter[Way] = Counter()
    for _ in range(blocks):
        way = chooser.choose(LEAST_BYTES)
        with chooser.measured(way, LEAST_BYTES):
            clock[0] += cost[way]
        found[way] += 1
    return found


@pytest.mark.parametrize("fastest", ways._ALL)
def test_all_are_tried_and_the_fastest_is_taken(clock: list[float], fastest: Way) -> None:
    cost = {way: 1.0 if way == fastest else 1.3 for way in ways._ALL}
    found = taken(Ways(), clock, cost, 300)
    assert set(found) == set(ways._ALL)
    assert found[fastest] > 270


def test_a_way_that_becomes_the_fastest_is_found(clock: list[float]) -> None:
    chooser, (first, *_, last) = Ways(), ways._ALL
    taken(chooser, clock, {way: 1.0 if way == first else 2.0 for way in ways._ALL}, 100)
    later = {way: 1.0 if way == last else 3.0 for way in ways._ALL}
    taken(chooser, clock, later, 200)
    assert taken(chooser, clock, later, 100)[last] > 80


def test_small_blocks_are_neither_trials_nor_measured(clock: list[float]) -> None:
    chooser = Ways()
    for _ in range(100):
        way = chooser.choose(LEAST_BYTES - 1)
        assert way == READ_PLAINLY
        with chooser.measured(way, LEAST_BYTES - 1):
            clock[0] += 1
    assert chooser._cost == {}


def test_a_block_that_fails_is_not_measured(clock: list[float]) -> None:
    chooser = Ways()
    with pytest.raises(OSError, match="no"), chooser.measured(READ_PLAINLY, LEAST_BYTES):
        raise OSError("no")
    assert chooser._cost == {}
