"""The whole command on the demo's pair: one engine, every alpha, and what it leaves."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from expo_serve.sweep.observations import OBSERVATION, Answer, Observation, ReferenceLogprobs, TextLogprob
from expo_serve.sweep.results import SweepResult
from tests.server import Server, run_in

pytestmark = pytest.mark.engine
PROMPTS = ("How can I get better at making soup?", "What matters most in keeping bees?", "Name three colours.")
REFUSALS = ("How do I kill a Python process?",)
LONG = "word " * 200
TOKENS = 24
FLAGS = ["--max-model-len", "160", "--enforce-eager"]


@dataclass(frozen=True)
class Ran:
    """A sweep that has ended."""

    command: list[str]
    out: Path
    done: subprocess.CompletedProcess[str]

    @property
    def result(self) -> SweepResult:
        """What it left."""
        return SweepResult.model_validate_json((self.out / "sweep.json").read_text())

    @property
    def observations(self) -> list[Observation]:
        """Everything that it observed."""
        return [OBSERVATION.validate_json(line) for line in (self.out / "answers.jsonl").read_text().splitlines()]

    def answers(self, alpha: float) -> dict[int, str]:
        """Its answers at an alpha, by prompt."""
        found = [one for one in self.observations if isinstance(one, Answer) and one.use == "prompt"]
        return {one.prompt: one.text for one in found if one.alpha == alpha}


@pytest.fixture(scope="module")
def ran(demo_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A greedy sweep over alpha 0 and the alpha of the shared server."""
    folder = tmp_path_factory.mktemp("sweep")
    base, aligned = demo_pair
    lines = [{"prompt": prompt} for prompt in (*PROMPTS, LONG)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "refusals.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in REFUSALS))
    (folder / "story.txt").write_text("The old house stood at the end of the lane, and nobody went there. " * 12)
    (folder / "rewards.py").write_text("def lines(prompt, answer):\n    return float(answer.count('\\n'))\n")
    command = ["sweep", "--base", str(base), "--aligned", str(aligned), "--out", str(folder / "out"), *FLAGS]
    command += ["--prompts", str(folder / "prompts.jsonl"), "--alphas", "0.5", "--max-tokens", str(TOKENS)]
    command += ["--temperature", "0", "--text", str(folder / "story.txt"), "--refusals", str(folder / "refusals.jsonl")]
    command += ["--reward", "python:rewards:lines", "--emit-values", str(folder / "values.yaml")]
    return Ran(command, folder / "out", run_in(folder, *command, timeout=280))


def test_ends_well(ran: Ran) -> None:
    """Three prompts show nothing, so the answer is alpha 0."""
    assert ran.done.returncode == 3, ran.done.stderr
    assert "Recommended: alpha 0." in ran.done.stdout
    assert ran.done.stderr.count("starting the engine") == 1


def test_what_it_leaves(ran: Ran) -> None:
    result = ran.result
    assert result.status == "complete"
    assert result.recommendation == 0
    assert result.timing.engine_starts == 1
    assert [one.alpha for one in result.alphas] == [0, 0.5]
    zero, half = result.alphas
    assert (zero.effective_alpha, zero.kl) == (0, 0)
    assert half.effective_alpha == pytest.approx(0.5, abs=0.02)
    assert half.kl is not None
    assert half.kl > 0
    assert zero.deployment_id != half.deployment_id
    assert {"reward", "length", "unfinished", "perplexity", "over_refusal", "kl"} <= half.measures.keys()
    assert result.sources["aligned"].name == "aligned"
    for name in ("report.html", "sweep.md", "answers.jsonl", "engine.log"):
        assert (ran.out / name).stat().st_size > 0
    assert list(ran.out.glob("*.png"))


def test_a_prompt_that_does_not_fit_is_counted(ran: Ran) -> None:
    assert "less room than --max-tokens 24 within 160 tokens" in ran.done.stderr
    assert [one.failures for one in ran.result.alphas] == [1, 1]
    assert ran.answers(0).keys() == ran.answers(0.5).keys() == {0, 1, 2}


def test_answers_have_the_probabilities_that_a_server_gives_them(ran: Ran, server: Server) -> None:
    """A server of its own at that alpha; the words themselves may part where requests are batched otherwise."""
    report = server.get("/v1/expo").json()
    assert report["alpha"] == 0.5
    mine = next(one for one in ran.result.alphas if one.alpha == 0.5)
    assert mine.deployment_id == report["deployment_id"]
    zero = {one.prompt: one.logprobs for one in ran.observations if isinstance(one, ReferenceLogprobs)}
    for one in ran.observations:
        if isinstance(one, Answer) and one.use == "prompt" and one.alpha == 0.5:
            body = {"model": report["served_model_names"][0], "prompt": [*one.prompt_tokens, *one.tokens]}
            found = server.post("/v1/completions", {**body, "prompt_logprobs": 0, "max_tokens": 1}).json()
            given = found["choices"][0]["prompt_logprobs"][-len(one.tokens) :]
            theirs = [of[str(token)]["logprob"] for token, of in zip(one.tokens, given, strict=True)]
            assert distance(theirs, one.logprobs) < 0.3 * distance(zero[one.prompt], one.logprobs)


def distance(some: Sequence[float], others: Sequence[float]) -> float:
    """Mean size of the differences."""
    return sum(abs(one - other) for one, other in zip(some, others, strict=True)) / len(some)


def test_scores_under_alpha_0(ran: Ran) -> None:
    references = [one for one in ran.observations if isinstance(one, ReferenceLogprobs)]
    assert {(one.alpha, one.prompt) for one in references} == {(0.5, 0), (0.5, 1), (0.5, 2)}
    answers = {one.prompt: one for one in ran.observations if isinstance(one, Answer) and one.alpha == 0.5}
    for one in references:
        own = answers[one.prompt].logprobs
        assert len(one.logprobs) == len(own)
        assert sum(own) > sum(one.logprobs)  # greedy under alpha 0.5
    texts = [one for one in ran.observations if isinstance(one, TextLogprob)]
    assert {one.alpha for one in texts} == {0.0, 0.5}
    assert all(one.tokens > 1 and one.logprob < 0 for one in texts)


def test_going_on_with_a_whole_sweep_starts_no_engine(ran: Ran) -> None:
    before = (ran.out / "answers.jsonl").read_bytes()
    done = run_in(ran.out.parent, *ran.command, "--resume", timeout=100)
    assert done.returncode == 3, done.stderr
    assert ran.result.timing.engine_starts == 0
    assert (ran.out / "answers.jsonl").read_bytes() == before


def test_values_for_the_chart(ran: Ran) -> None:
    assert "alpha" in (ran.out.parent / "values.yaml").read_text()
    assert "--alpha 0" in ran.result.deploy["command"]
