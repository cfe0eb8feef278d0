"""The chaos suite: what it plans, how it judges, what it reports; and five minutes of it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expo_serve.errors import ERROR_PREFIX
from loadtests.chaos import __main__ as command
from loadtests.chaos.faults import CATALOGUE, Ending, Promise
from loadtests.chaos.inject import INJECTORS
from loadtests.chaos.judge import Seen, judge
from loadtests.chaos.outcomes import Outcome
from loadtests.chaos.plan import plan
from loadtests.chaos.report import as_figures, summary
from loadtests.chaos.run import Result
from loadtests.chaos.surroundings import NEEDS
from loadtests.chaos.victim import Remains
from tests.loadtest_runs import run_for_minutes


@given(seed=st.integers(0, 10_000), minutes=st.floats(0, 90))
def test_plan_is_a_function_of_seed_and_minutes(seed: int, minutes: float) -> None:
    lives = plan(seed, minutes)
    assert lives == plan(seed, minutes)
    assert len(lives) == 1 or sum(life.seconds for life in lives) <= minutes * 60
    for life in lives:
        *survived, last = (fault.what for fault in life.faults)
        assert not any(kind.is_last for kind in survived)
        assert last.when == "serving" or not survived
        for fault in life.faults:
            assert fault.what.holds[0] <= fault.holds <= fault.what.holds[1]


def test_every_fault_comes_once_before_any_comes_again() -> None:
    names = [fault.kind for life in plan(3, 200) for fault in life.faults]
    counts = Counter(names)
    assert counts.keys() == CATALOGUE.keys()
    assert max(counts.values()) - min(counts.values()) <= 1
    assert set(names[: len(CATALOGUE)]) == CATALOGUE.keys()


def test_plans_of_other_seeds_are_others() -> None:
    assert len({tuple(plan(seed, 20)) for seed in range(8)}) == 8


def test_plan_of_chosen_faults() -> None:
    assert [[fault.kind for fault in life.faults] for life in plan(1, 0, ["stop engine briefly", "kill worker"])] == [
        ["stop engine briefly", "kill worker"]
    ]
    with pytest.raises(ValueError, match="no such fault: kill cat; there are "):
        plan(1, 1, ["kill cat"])


def test_every_fault_can_be_done_and_ends_or_recovers() -> None:
    for name, kind in CATALOGUE.items():
        assert kind.name == name
        assert kind.injector in INJECTORS
        assert kind.needs <= NEEDS.keys()
        assert kind.promise.ending or kind.promise.recovery is not None
        assert Outcome.UNEXPECTED not in kind.promise.clients


NAMED = Ending((1,), 20, "VLLM::Worker", "died")
ENDS = Promise(
    frozenset({Outcome.COMPLETE, Outcome.CUT}),
    Ending((1,), 20, "VLLM::Worker", "died"),
    may_fail=frozenset({"ready", "health"}),
)
GOES_ON = Promise(frozenset({Outcome.COMPLETE}), recovery=5)
ENDED = Seen(
    Counter({Outcome.CUT: 3}),
    code=1,
    end_seconds=12,
    last_line="expo-serve: error: VLLM::Worker died",
    reason="died",
    remains=Remains((), (), (), ()),
)
WENT_ON = Seen(Counter({Outcome.COMPLETE: 3}), recovery_seconds=1.0, no_seconds={"health": None, "ready": None})


@pytest.mark.parametrize(("promise", "seen"), [(ENDS, ENDED), (GOES_ON, WENT_ON)])
def test_promise_that_is_kept(promise: Promise, seen: Seen) -> None:
    assert judge(promise, seen) == []


@pytest.mark.parametrize(("change", "broken"), [
    ({"code": 0}, "exit code 0, not 1: expo-serve: error: VLLM::Worker died"),
    ({"end_seconds": 21.0}, "the end took 21.0 s, not 20"),
    ({"last_line": "VLLM::Worker died"}, "the last line is no error: VLLM::Worker died"),
    ({"last_line": f"{ERROR_PREFIX}so"}, f"the last line does not name the cause (VLLM::Worker): {ERROR_PREFIX}so"),
    ({"reason": "serve"}, "the status port gave the reason 'serve', not 'died'"),
    ({"remains": Remains(("12 worker",), (), (), ())}, "1 processes left: 12 worker"),
    ({"remains": Remains((), ("psm_1", "psm_2"), (), ())}, "2 segments left: psm_1, psm_2"),
    ({"remains": Remains((), (), ("a",), ())}, "1 sockets left: a"),
    ({"clients": Counter({Outcome.UNEXPECTED: 2}), "unexpected": ["500: oh"]}, "2 requests: unexpected (500: oh)"),
    ({"still_open": True}, "a client still waited for its answer in the end"),
    ({"code": None}, "the server did not end within 20 s"),
])  # fmt: skip
def test_ending_that_breaks_its_promise(change: dict[str, Any], broken: str) -> None:
    found = judge(ENDS, replace(ENDED, **change))
    assert broken in found
    assert len(found) <= 2  # an exit code of 0 after an error counts by itself too


@pytest.mark.parametrize(("change", "broken"), [
    ({"recovery_seconds": None}, "the server lives, and answers no new request"),
    ({"recovery_seconds": 6.0}, "it answered 6.0 s after the fault, not within 5 s"),
    ({"code": 1, "last_line": "so"}, "the server ended with exit code 1: so"),
    ({"no_seconds": {"health": 1.5}}, "/health did not say yes 1.5 s after the beginning"),
    ({"compared": 6, "wrong": 2}, "2 of 6 greedy answers are not those from before"),
    ({"clients": Counter({Outcome.CUT: 1}), "unexpected": ["reset"]}, "1 requests: cut without a word (reset)"),
])  # fmt: skip
def test_survivor_that_breaks_its_promise(change: dict[str, Any], broken: str) -> None:
    assert judge(GOES_ON, replace(WENT_ON, **change)) == [broken]


def test_hang_has_to_be_noticed() -> None:
    promise = replace(GOES_ON, unready=15)
    assert judge(promise, replace(WENT_ON, no_seconds={"health": 11.0, "ready": 11.5})) == []
    assert judge(promise, replace(WENT_ON, no_seconds={"health": 16.0, "ready": None})) == [
        "/health said no only after 16.0 s, not within 15 s", "/ready never said no, not within 15 s"
    ]  # fmt: skip


def test_drain_has_to_refuse_somebody() -> None:
    promise = replace(ENDS, must_see=frozenset({Outcome.BUSY}))
    assert judge(promise, ENDED) == ["no client saw: 503 with Retry-After"]


def test_either_an_end_or_recovery_where_both_are_right() -> None:
    either = replace(ENDS, recovery=5)
    assert judge(either, ENDED) == judge(either, replace(WENT_ON, no_seconds={})) == []


def test_report_of_a_run() -> None:
    (life,) = plan(1, 0, ["stop engine briefly", "kill worker"])
    first, last = life.faults
    broken = replace(ENDED, last_line="expo-serve: error: /secret/place/model.safetensors is gone")
    results = [
        Result(first, 1, "kept", seen=WENT_ON),
        Result(last, 1, "broken", ["so it was"], broken),
        Result(last, 2, "not possible here", ["no root"]),
    ]
    figures = as_figures(results)
    assert figures["verdicts"] == {"kept": 1, "broken": 1, "not possible here": 1}
    assert figures["requests"] == {"complete": 3, "cut without a word": 3}
    assert "secret" not in json.dumps(figures)
    assert "| kill worker | 1 broken, 1 not possible here |  | 12.0 | 1 |" in summary(figures)
    assert "kill worker: no root" in summary(figures)


def test_plan_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["chaos", "--list", "--minutes", "1", "--only", "kill worker"])
    assert command.main() == 0
    assert capsys.readouterr().out.startswith("1: kill worker (after ")


def test_unknown_fault_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["chaos", "--only", "kill cat"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "kill cat" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("demo_pair")
def test_five_minutes_of_chaos(tmp_path: Path) -> None:
    figures = run_for_minutes("loadtests.chaos", "chaos", tmp_path, "--minutes", "5", "--seed", "7")
    assert figures["verdicts"].keys() <= {"kept", "not possible here"}
    assert figures["verdicts"]["kept"] > 3
    assert figures["greedy_answers"]["compared"] > 0
