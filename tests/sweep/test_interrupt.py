"""A sweep that is cut short: what it did is kept, nothing runs on, and it can be gone on with."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from expo_serve.sweep.observations import OBSERVATION, Answer, Loaded
from expo_serve.sweep.results import SweepResult
from tests.server import ENGINE_ENV, EXPO_SERVE, run_command

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


def begin(folder: Path, demo_pair: tuple[Path, Path]) -> list[str]:
    """Write the files of a sweep; returns its command line."""
    base, aligned = demo_pair
    questions = [{"prompt": f"Tell me about the number {number}."} for number in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    command = ["sweep", "--base", str(base), "--aligned", str(aligned), "--out", str(folder / "out")]
    command += ["--prompts", str(folder / "prompts.jsonl"), "--alphas", "0,0.5,1", "--max-tokens", "64"]
    return [*command, "--max-model-len", "256", "--enforce-eager"]


def complete(out: Path) -> set[float]:
    """The alphas that are wholly observed."""
    path = out / "answers.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [OBSERVATION.validate_json(line) for line in lines if line.endswith("}")]
    return {one.alpha for one in found if isinstance(one, Loaded)}


def run_until_first(
    command: list[str], out: Path, folder: Path
) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """Start a sweep and wait until alpha 0 is done; returns it and all of its processes."""
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*EXPO_SERVE, *command], stdout=log, stderr=log, env=ENGINE_ENV)
    deadline = time.monotonic() + 240
    while not complete(out):
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return process, psutil.Process(process.pid).children(recursive=True)


def assert_gone(family: list[psutil.Process]) -> None:
    """Nothing of the engine runs on."""
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []


def test_ctrl_c_and_resume(demo_pair: tuple[Path, Path], tmp_path: Path) -> None:
    command = begin(tmp_path, demo_pair)
    process, family = run_until_first(command, tmp_path / "out", tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert_gone(family)
    left = SweepResult.model_validate_json((tmp_path / "out/sweep.json").read_text())
    assert left.status == "interrupted"
    assert left.recommendation is None
    assert left.alphas[0].alpha == 0
    before = (tmp_path / "out/answers.jsonl").read_text()

    refused = run_command(*command)
    assert refused.returncode == 2
    assert "exists; give a folder that does not exist yet, or --resume" in refused.stderr
    other = run_command(*command, "--resume", "--seed", "7")
    assert other.returncode == 2
    assert "seed was 0, is 7" in other.stderr

    done = run_command(*command, "--resume", timeout=280)
    assert done.returncode == 0, done.stderr  # without a reward
    result = SweepResult.model_validate_json((tmp_path / "out/sweep.json").read_text())
    assert (result.status, result.decision.kind) == ("complete", "none")
    assert [one.alpha for one in result.alphas] == [0, 0.5, 1]
    text = (tmp_path / "out/answers.jsonl").read_text()
    assert text.startswith(before)
    answers = [one for one in map(OBSERVATION.validate_json, text.splitlines()) if isinstance(one, Answer)]
    assert sorted((one.alpha, one.prompt) for one in answers) == [(a, p) for a in (0, 0.5, 1) for p in range(12)]


def test_an_engine_that_dies(demo_pair: tuple[Path, Path], tmp_path: Path) -> None:
    command = begin(tmp_path, demo_pair)
    process, family = run_until_first(command, tmp_path / "out", tmp_path)
    engine = next(one for one in family if "EngineCore" in " ".join(one.cmdline()))
    engine.kill()
    assert process.wait(90) == 1
    assert_gone(family)
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("expo-serve: error: the engine")
    assert SweepResult.model_validate_json((tmp_path / "out/sweep.json").read_text()).status == "interrupted"


def test_a_command_that_is_killed(demo_pair: tuple[Path, Path], tmp_path: Path) -> None:
    """SIGKILL leaves no time for anything, and still no engine."""
    process, family = run_until_first(begin(tmp_path, demo_pair), tmp_path / "out", tmp_path)
    process.kill()
    process.wait(10)
    assert_gone(family)
