"""What the status port shows, from what the processes report."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from expo_serve.state.exposition import exposition
from expo_serve.state.snapshot import PHASES, Words, first_killed, snapshot, without_paths

COMMAND = {
    "role": "command",
    "started": 100.0,
    "started_at": 1.7e9,
    "alpha": "0.5",
    "names": ["m"],
    "phases": {"resolve": 100.1, "start": 102.0},
}
SERVING = {"role": "keeper", "phases": {"serving": 130.0}}
API = {"role": "api", "answered": 138.0, "open": 3, "cut": 0, "names": ["one", "two"]}


def rank(number: int, done: int, **more: Any) -> dict[str, Any]:
    """The report of a rank."""
    sources = {"base": [done, 1000], "aligned": [done, 3000]}
    return {
        "role": "rank",
        "engine": 0,
        "rank": number,
        "began": 110.0,
        "updated": 111.0,
        "sources": sources,
        **more,
    }


@pytest.mark.parametrize(
    ("reports", "words", "phase", "seconds"),
    [
        ([], Words(), "resolve", {}),
        ([COMMAND], Words(), "start", {"resolve": 1.9, "start": 38.0}),
        ([COMMAND, rank(0, 1)], Words(), "load", {"resolve": 1.9, "start": 8.0, "load": 30.0}),
        ([COMMAND, rank(0, 1, ended=115.0), rank(1, 1)], Words(), "load", {"load": 30.0}),
        ([COMMAND, rank(0, 1, ended=115.0), rank(1, 1, ended=116.0)], Words(), "warm_up", {"load": 6.0}),
        ([COMMAND, rank(0, 1, ended=115.0), SERVING, API], Words(), "serving", {"warm_up": 15.0, "serving": 10.0}),
        ([COMMAND, SERVING, API], Words(draining=139.0), "draining", {"serving": 9.0, "draining": 1.0}),
        ([{**COMMAND, "phases": {"resolve": 100.0, "failed": 101.0}}], Words(), "failed", {"resolve": 1.0}),
        ([COMMAND, SERVING, API, {"role": "keeper", "phases": {"failed": 139.5}}], Words(), "failed", {"failed": 0.5}),
    ],
)
def test_phases(reports: list[dict[str, Any]], words: Words, phase: str, seconds: dict[str, float]) -> None:
    state = snapshot(reports, words, 140.0)
    assert state["phase"] == phase
    assert state["ready"] == (phase == "serving") == (state["reason"] is None)
    assert {name: state["phase_seconds"][name] for name in seconds} == pytest.approx(seconds)


def test_load_of_several_ranks() -> None:
    load = snapshot([COMMAND, rank(0, 500), rank(1, 1000, updated=118.0)], Words(), 120.0)["load"]
    assert load["total_bytes"] == 8000
    assert load["done_bytes"] == 3000
    assert load["bytes_per_second"] == 300
    assert load["seconds_left"] == pytest.approx(5000 / 300, abs=0.01)
    assert load["stalled_seconds"] == 9.0  # rank 0 last moved at 111
    done = snapshot([COMMAND, rank(0, 1000, ended=115.0)], Words(), 200.0)["load"]
    assert [done[key] for key in ("seconds_left", "stalled_seconds", "bytes_per_second")] == [0.0, 0.0, 400]


def test_rank_that_was_started_anew_counts_once() -> None:
    load = snapshot([rank(0, 900, ended=111.0), rank(0, 10)], Words(), 120.0)["load"]
    assert [entry["is_done"] for entry in load["ranks"]] == [False]


@pytest.mark.parametrize(("timeout", "is_hung"), [(0.0, False), (5.0, True), (60.0, False)])
def test_hung_engine_is_not_ready(timeout: float, is_hung: bool) -> None:
    late = {**API, "answered": 110.0}
    state = snapshot([COMMAND, SERVING, API, late], Words(engine_timeout=timeout), 140.0)
    assert state["engine"] == {"silent_seconds": 30.0, "is_hung": is_hung}
    assert state["ready"] != is_hung
    assert state["reason"] == ("the engine has not answered for 30 s" if is_hung else None)
    assert state["served_model_names"] == ["one", "two"]
    assert state["requests"] == {"open": 6, "cut": 0}


def test_error_is_that_of_the_process_nearest_to_it() -> None:
    def failed(role: str, message: str) -> dict[str, Any]:
        return {"role": role, "error": {"reason": "load", "message": message}, "engine": 0, "rank": 0, "began": 0.0,
                "updated": 0.0}  # fmt: skip

    reports = [failed("command", "c"), failed("keeper", "k"), failed("rank", "/models/x/a.safetensors: r")]
    error = snapshot(reports, Words(), 1.0)["error"]
    assert error == {"reason": "load", "message": "a.safetensors: r"}


@pytest.mark.parametrize(
    ("ended", "killed"),
    [
        ([], None),
        ([[[7, "a", -9, 5.0]]], (7, "a", -9)),
        ([[[7, "a", 0, 1.0], [8, "b", -15, 2.0], [9, "c", -11, 3.0]], [[10, "d", -9, 2.5]]], (10, "d", -9)),
        ([[[7, "a", -9, 20.0]]], None),  # vLLM's own doing, after it had said that something failed
        ([[[7, "a", -9, 10.2]]], (7, "a", -9)),
    ],
)
def test_first_that_a_signal_has_killed(ended: list[list[Any]], killed: tuple[int, str, int] | None) -> None:
    assert first_killed([{"ended": ends} for ends in ended], 10.0) == killed


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/models/a/model.safetensors: expected 10 bytes", "model.safetensors: expected 10 bytes"),
        ("'/srv/x' and \"~/y/z.json\", ./a/b (../c/d)", "'x' and \"z.json\", b (d)"),
        ("org/name at https://hub/org/name, 3/4, and/or", "org/name at https://hub/org/name, 3/4, and/or"),
        ("/", "/"),
        ("/models/", "/"),
        ("a:/b/c", "a:/b/c"),
        ("--base=/a/b", "--base=b"),
        ("no path", "no path"),
        ("file '/srv/My Models/team secret/x/f': gone", "file 'f': gone"),
        ("/data/v1:final/private/x and /mnt/a,b/c/d", "x and d"),
        ("file:///home/alice/x, //home/u/y", "x, y"),
        ("models/private/x, 'models/my private/y' and 'org/name'", "x, 'y' and 'org/name'"),
    ],
)
def test_paths_are_not_shown(text: str, shown: str) -> None:
    assert without_paths(text) == shown


def test_process_that_has_died_makes_it_not_ready() -> None:
    reports = [COMMAND, API, {**SERVING, "has_lost": True}]
    state = snapshot(reports, Words(), 140.0)
    assert (state["phase"], state["ready"], state["reason"]) == ("serving", False, "a process of vLLM has died")


@given(st.lists(st.sampled_from(["/", "~", ".", "a", " ", ":", "/b/c"])))
def test_paths_are_found_in_linear_time_and_never_absolute(parts: list[str]) -> None:
    assert len(without_paths("".join(parts))) <= max(1, len("".join(parts)))


def metrics(state: dict[str, Any]) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Name to labels to value, as Prometheus reads them."""
    return {
        family.name: {tuple(sorted(sample.labels.items())): sample.value for sample in family.samples}
        for family in text_string_to_metric_families(exposition(state).decode())
    }


def test_gauges() -> None:
    error = {"reason": "values", "message": 'a "quoted"\\ ' + "x" * 500}
    reports = [COMMAND, rank(0, 500), rank(1, 250), {"role": "rank", "engine": 1, "rank": 0, "began": 110.0,
               "updated": 110.0, "error": error}]  # fmt: skip
    found = metrics(snapshot(reports, Words(), 120.0))
    assert found["expo_state_phase"] == {(("phase", phase),): float(phase == "load") for phase in PHASES}
    assert found["expo_state_ready"] == {(): 0.0}
    assert found["expo_state_start_time_seconds"] == {(): 1.7e9}
    key = (("engine", "0"), ("rank", "1"), ("source", "aligned"))
    assert found["expo_state_load_done_bytes"][key] == 250
    assert found["expo_state_load_total_bytes"][key] == 3000
    ((labels, value),) = found["expo_state_failed"].items()
    assert dict(labels)["reason"] == "values"
    assert len(dict(labels)["message"]) == 120
    assert value == 1
    assert "expo_state_engine_silent_seconds" not in found
    assert json.dumps(reports)  # nothing was changed into what is no JSON


def test_gauges_of_nothing() -> None:
    found = metrics(snapshot([], Words(), 1.0))
    assert found["expo_state_phase"][(("phase", "resolve"),)] == 1
    assert "expo_state_load_bytes_per_second" not in found
