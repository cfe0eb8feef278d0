"""The real lm-evaluation-harness against a running engine, without a hub."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from expo_serve.errors import UsageError
from expo_serve.sweep.endpoint import Endpoint
from expo_serve.sweep.lm_eval import check_lm_eval, run_lm_eval
from tests.server import Server

pytestmark = [pytest.mark.engine, pytest.mark.locked]
HARNESS = Path(__file__).parents[2] / ".venv/lm-eval"


class Asked(NamedTuple):
    """A question of the tasks below."""

    question: str
    choices: tuple[str, str]
    answer: int


QUESTIONS = [
    Asked("The capital of France is", ("Paris", "Table"), 0),
    Asked("Two plus two is", ("lamp", "four"), 1),
    Asked("Cats and dogs are", ("animals", "numbers"), 0),
    Asked("Water is", ("wet", "an opera"), 1),
    Asked("The sun is a", ("star", "purple"), 0),
]


def write_tasks(folder: Path) -> list[str]:
    """Own task files: one of choices, one that generates."""
    (folder / "data.jsonl").write_text("".join(json.dumps(question._asdict()) + "\n" for question in QUESTIONS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(folder / "data.jsonl")},
        "test_split": "train",
    }
    choice: dict[str, Any] = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    words: dict[str, Any] = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "filter_list": [
            {"name": "word", "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}]}
        ],
        "metric_list": [{"metric": "exact_match"}],
    }
    files = []
    for name, task in {"my_choice": choice, "my_words": words}.items():
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump({"task": name, **common, **task}))
    return [str(file) for file in files]


def log_likelihood(server: Server, context: str, choice: str) -> float:
    """Of a continuation, by the server itself."""
    body = {"model": "first", "prompt": f"{context} {choice}", "max_tokens": 1, "echo": True, "logprobs": 0}
    found = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    pairs = zip(found["text_offset"], found["token_logprobs"], strict=True)
    return math.fsum(value for offset, value in pairs if len(context) <= offset < len(context) + 1 + len(choice))


def best(server: Server, asked: Asked) -> str:
    """The likeliest choice."""
    return max(asked.choices, key=lambda choice: log_likelihood(server, asked.question, choice))


def word(server: Server, context: str) -> str:
    """The first word of the greedy continuation."""
    body = {"model": "first", "prompt": context, "max_tokens": 4, "temperature": 0, "stop": "\n"}
    found = re.search(r"\w+", server.post("/v1/completions", body).json()["choices"][0]["text"])
    return found[0] if found else "[invalid]"


@pytest.mark.slow
def test_harness_asks_a_running_engine(
    server: Server, demo_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real one, which finds no hub here; its scores are those that the server's own numbers give."""
    monkeypatch.setenv("PYTHONPATH", str(HARNESS))
    monkeypatch.setenv("PATH", f"{HARNESS}/bin", prepend=":")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = write_tasks(tmp_path)
    check_lm_eval(tasks)
    endpoint = Endpoint(f"{server.url}/v1", "first", server.api_key, "0.5", str(demo_pair[1]))
    found = list(run_lm_eval(tasks, endpoint, tmp_path / "out"))
    choices = [float(best(server, one) == one.choices[one.answer]) for one in QUESTIONS]
    words = [float(word(server, one.question) == one.choices[one.answer]) for one in QUESTIONS]
    assert 0 < sum(choices) < len(QUESTIONS)
    assert [one.correct for one in found if one.task == "my_choice"] == choices
    assert [one.correct for one in found if one.task == "my_words"] == words
    assert {one.alpha for one in found} == {0.5}


def test_harness_names_an_unknown_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one, importable by this Python; no engine is needed, but it takes some seconds."""
    monkeypatch.setenv("PYTHONPATH", str(HARNESS))
    monkeypatch.syspath_prepend(HARNESS)
    with pytest.raises(UsageError, match="has no task no_such_task; "):
        check_lm_eval(["arc_easy", "no_such_task"])
