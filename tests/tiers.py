"""The tier of slow tests under a time budget: where a run begins, and when it starts no further test.

``make test`` leaves out what is marked ``slow``, ``make test-all`` leaves out nothing. CI runs ``make test`` and then,
with ``-m slow --budget SECONDS --turn COMMITS``, as many of the slow tests as fit. Each commit begins one slice
further on, a slice being tests of five minutes by ``durations.json``, and goes on behind its slice for as long as
there is time. So the tests of every slice run within as many commits as there are slices, wherever a run gets through
at least one. Splitters such as pytest-split select one slice and stop there; ``--session-timeout`` fails the run.

``--store-durations`` renews ``durations.json`` with what the slow tests of this run took.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

DURATIONS = Path(__file__).with_name("durations.json")
SLICE_SECONDS = 300.0
UNKNOWN_SECONDS = 5.0
"""What a test that was never measured is taken for."""

Element = TypeVar("Element")


def rotated(elements: Sequence[Element], seconds: Sequence[float], turn: int) -> list[Element]:
    """All elements in their order, begun at the slice of this turn.

    Args:
        elements: what is run one after the other.
        seconds: what each of them takes.
        turn: counts on from run to run.
    """
    total = sum(seconds)
    slices = max(1, math.ceil(total / SLICE_SECONDS))
    begin, passed, first = turn % slices * total / slices, 0.0, 0
    while first < len(seconds) and passed + seconds[first] <= begin:
        passed += seconds[first]
        first += 1
    return [*elements[first:], *elements[:first]]


class Budget:
    """Puts the tests into the order of this turn, and starts none for which the time is too short."""

    def __init__(
        self, seconds: float, turn: int, durations: Mapping[str, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._end = clock() + seconds
        self._seconds = seconds
        self._turn = turn
        self._durations = durations
        self._clock = clock
        self.not_reached: list[str] = []

    def expected(self, test: str) -> float:
        """Seconds that a test takes, by its id."""
        return self._durations.get(test, UNKNOWN_SECONDS)

    def is_over_for(self, test: str) -> bool:
        """Whether this test would end too late, or one before it would have."""
        return bool(self.not_reached) or self._clock() + self.expected(test) > self._end

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = rotated(items, [self.expected(item.nodeid) for item in items], self._turn)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if not self.is_over_for(item.nodeid):
            return None
        self.not_reached.append(item.nodeid)
        return True  # pytest takes it for done: neither run nor reported

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.not_reached:
            terminalreporter.write_line(
                f"{len(self.not_reached)} tests were not reached within {self._seconds:.0f} s, the first "
                f"{self.not_reached[0]}; the next commits begin further on and run them (make test-all runs all)."
            )


class Stopwatch:
    """Writes down what each slow test of a run took, fixtures included."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "slow" in report.keywords:
            self._seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        store(self._file, self._seconds)


def read(file: Path = DURATIONS) -> dict[str, float]:
    """Seconds by test; empty where nothing was measured yet."""
    durations: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    return durations


def store(file: Path, seconds: Mapping[str, float]) -> None:
    """Put new figures into the file; those of other tests stay."""
    kept = {**read(file), **{test: round(value, 2) for test, value in seconds.items()}}
    file.write_text(json.dumps(kept, indent=0, sort_keys=True) + "\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tiers")
    group.addoption("--budget", type=float, metavar="SECONDS", help="start no test that would end later than this")
    group.addoption("--turn", type=int, default=0, metavar="N", help="begin at the Nth slice, counted around")
    group.addoption("--store-durations", action="store_true", help=f"write what slow tests took into {DURATIONS.name}")


def pytest_configure(config: pytest.Config) -> None:
    seconds: float | None = config.getoption("budget")
    if seconds is not None:
        config.pluginmanager.register(Budget(seconds, config.getoption("turn"), read()), "budget")
    if config.getoption("store_durations"):
        config.pluginmanager.register(Stopwatch(DURATIONS), "stopwatch")
