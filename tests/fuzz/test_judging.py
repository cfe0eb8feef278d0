"""The fuzzers see what breaks a promise, and run as people run them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from expo_serve.errors import PairError
from loadtests.fuzz import judge
from loadtests.fuzz.changes import CHANGES, change_json, joined
from loadtests.fuzz.deployments import Format
from loadtests.fuzz.layouts import place_layout
from tests.models.raw import write_pair

ROOT = Path(__file__).parents[2]


def _raise(error: BaseException) -> Callable[..., None]:
    def raises(*_: object) -> None:
        raise error

    return raises


BROKEN: dict[str, tuple[Callable[..., object], str]] = {
    "another exception": (_raise(KeyError("x")), "KeyError at "),
    "an exit": (_raise(SystemExit(1)), "SystemExit at "),
    "two lines": (_raise(PairError("a\nb")), "control characters at "),
    "a colour in a detail": (_raise(PairError("a", ["\x1b[31m"])), "control characters at "),
    "a long line": (_raise(PairError("a" * 5000)), "line too long at "),
    "what inspect takes": (_raise(PairError("a")), "inspect says accepted, prepare refused"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_promise_is_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, aligned = write_pair(tmp_path)
    kind = Format("pair", "", ("--base", str(base), "--aligned", str(aligned), "--alpha", "1"))
    assert judge._judged(kind).kind == "accepted"
    spoil, expected = BROKEN[name]
    monkeypatch.setattr(judge, "prepare", spoil)
    outcome = judge._judged(kind)
    assert outcome.kind == "wrong"
    assert outcome.place.startswith(expected), outcome


@pytest.mark.parametrize("name", ["safetensors", "packed delta", "yaml", "config"])
def test_changes_are_the_same_for_a_seed_and_many(name: str) -> None:
    contents = {"yaml": b"alpha: 0.5\nbase: x\n", "config": b'{"a": {"b": [1, 2]}}'}
    header = b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}'
    content = contents.get(name, joined(header, b"x"))
    change = CHANGES.get(name, change_json)
    made = [[change(content, random.Random(seed)) for seed in range(60)] for _ in range(2)]
    assert made[0] == made[1]
    assert len(set(made[0])) > 40


def test_layout_is_made_within_its_folder(tmp_path: Path) -> None:
    """Also where an entry is a link, or lies behind one, and without waiting for a pipe's reader."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    layout = [
        ["a", "link", str(outside / "kept")], ["a", "file", "changed"], ["a", "copy", "config.json"],
        ["b", "fifo", ""], ["b", "file", "changed"],
        ["c", "link", str(outside)], ["c/new", "file", "changed"], ["../outside/new", "file", "changed"],
    ]  # fmt: skip
    place_layout(tmp_path / "layout", json.dumps(layout).encode())
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"kept": "kept"}
    assert sorted(path.name for path in (tmp_path / "layout").iterdir()) == ["a", "b", "c"]


@pytest.mark.slow
def test_formats_are_fuzzed(tmp_path: Path) -> None:
    arguments = ["--minutes", "0.3", "--seed", "7", "--only", "adapter config", "yaml"]
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    command = [sys.executable, "-m", "loadtests.fuzz.formats", *arguments, *places]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "fuzz_formats.json").read_text())["seed 7"]
    assert (figures["finds"], figures["seed"]) == ({}, 7)
    assert figures["outcomes"].keys() == {"adapter config", "yaml"}
    assert all(outcomes.keys() == {"changed", "made"} for outcomes in figures["outcomes"].values())
    assert figures["executions"]["total"] > 100
