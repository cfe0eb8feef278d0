"""A budget of time for the slow tests: none is started too late, and over some commits all of them run."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conformance.families import FAMILIES
from tests.conformance.seen import CORE
from tests.tiers import SLICE_SECONDS, Budget, Stopwatch, read, rotated, store

ROOT = Path(__file__).parents[1]
TESTS = (
    "import pytest\n\n@pytest.mark.parametrize('number', range(4))\ndef test(number):\n    assert number != {fails}\n"
)


@given(
    seconds=st.lists(st.floats(0.01, SLICE_SECONDS), min_size=1, max_size=60),
    first_turn=st.integers(0, 1000),
    budget_seconds=st.floats(2 * SLICE_SECONDS, 9 * SLICE_SECONDS),
)
def test_every_test_runs_within_as_many_commits_as_there_are_slices(
    seconds: list[float], first_turn: int, budget_seconds: float
) -> None:
    """Where a run gets through one slice and the test that begins in it."""
    names = [str(number) for number in range(len(seconds))]
    durations = dict(zip(names, seconds, strict=True))
    run: set[str] = set()
    for turn in range(first_turn, first_turn + math.ceil(sum(seconds) / SLICE_SECONDS)):
        now = [0.0]
        budget = Budget(budget_seconds, turn, durations, partial(now.__getitem__, 0))
        for name in rotated(names, seconds, turn):
            if budget.is_over_for(name):
                break
            now[0] += durations[name]
            run.add(name)
    assert run == set(names)


@given(seconds=st.lists(st.floats(0, 1000)), turn=st.integers(0, 1000))
def test_order_changes_only_where_it_begins(seconds: list[float], turn: int) -> None:
    numbers = list(range(len(seconds)))
    found = rotated(numbers, seconds, turn)
    assert sorted(found) == numbers
    assert all((after - before) % len(numbers) == 1 for before, after in pairwise(found))


def test_turns_begin_at_slices_of_one_length() -> None:
    seconds = [SLICE_SECONDS / 10] * 30
    assert [rotated(range(30), seconds, turn)[0] for turn in range(5)] == [0, 10, 20, 0, 10]


def test_no_test_starts_that_would_end_too_late() -> None:
    now = [0.0]
    budget = Budget(100, 0, {"short": 10, "long": 60}, lambda: now[0])
    assert not budget.is_over_for("long")
    now[0] = 50
    assert budget.is_over_for("long")
    assert not budget.is_over_for("short")
    budget.not_reached.append("long")
    assert budget.is_over_for("short"), "a run ends where it stopped first"


def test_durations_of_other_tests_stay(tmp_path: Path) -> None:
    store(tmp_path / "file", {"one": 1, "two": 2.006})
    store(tmp_path / "file", {"two": 3, "three": 1})
    assert read(tmp_path / "file") == {"one": 1, "two": 3, "three": 1}
    assert read(tmp_path / "none") == {}


def test_only_slow_tests_are_timed(tmp_path: Path) -> None:
    stopwatch = Stopwatch(tmp_path / "file")
    for name, keywords in (("slow", {"slow": 1}), ("quick", {})):
        for when, seconds in (("setup", 2.0), ("call", 1.0)):
            stopwatch.pytest_runtest_logreport(
                pytest.TestReport(name, ("", 0, ""), keywords, "passed", None, when, duration=seconds)  # type: ignore[arg-type]
            )
    stopwatch.pytest_sessionfinish()
    assert read(tmp_path / "file") == {"slow": 3.0}


def run_pytest(folder: Path, *arguments: str, fails: int = 9) -> subprocess.CompletedProcess[str]:
    """Four tests under this plugin, one of which may fail."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_four.py").write_text(TESTS.format(fails=fails))
    command = [sys.executable, "-m", "pytest", "-p", "tests.tiers", "-p", "no:cacheprovider", "-q", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [*command, str(folder)], capture_output=True, text=True, timeout=60, cwd=folder, env=environment
    )


@pytest.mark.parametrize(("seconds", "fails", "code", "closing"), [
    ("60", 9, 0, "4 passed in "), ("60", 2, 1, "1 failed, 3 passed in "), ("0", 9, 0, "no tests ran in "),
])  # fmt: skip
def test_run_ends_as_pytest_does(tmp_path: Path, seconds: str, fails: int, code: int, closing: str) -> None:
    result = run_pytest(tmp_path, "--budget", seconds, fails=fails)
    assert result.returncode == code, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1].startswith(closing)
    assert ("4 tests were not reached within 0 s" in result.stdout) == (seconds == "0")


def _marks_slow(conftest: Path) -> bool:
    """Whether a fixture of a folder runs tests in a slow way too."""
    return conftest.exists() and "pytest.mark.slow" in conftest.read_text()


def test_durations_are_those_of_the_slow_tests() -> None:
    """Of what runs every time nobody asks. ``pytest -m slow --store-durations`` writes them."""
    durations = read()
    families = {f"tests/conformance/test_families.py::test_family[{family.name}]": family.name for family in FAMILIES}
    assert {name for test, name in families.items() if test not in durations} == CORE.keys()
    files = {test: ROOT / test.partition("::")[0] for test in durations}
    texts = {test: file.read_text() for test, file in files.items()}
    marking = {test for test, text in texts.items() if "pytest.mark.slow" in text}
    marking |= {test for test, file in files.items() if _marks_slow(file.with_name("conftest.py"))}
    assert texts.keys() - marking == set()
    names = {test: test.split("::")[1].partition("[")[0] for test in durations}
    assert [test for test, text in texts.items() if f"def {names[test]}(" not in text] == []
