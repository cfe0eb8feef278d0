"""``--lm-eval``: lm-evaluation-harness, as it is, in a process of its own, against the engine under test.

The harness asks by ``local-completions``: log-likelihoods by ``echo`` and ``logprobs``, generative tasks by completions
without a chat template. What it asks is pinned to the alpha, and tokenised as the server tokenises text. From the
samples that it writes, each question's score of the task's main metric is taken:

1. of several filters of a task, the first;
2. the first of ``acc_norm``, ``acc`` and ``exact_match`` that the task has, else its first metric that is a number for
   each question.

A task of one's own is named by its ``.yaml`` file; relative ``data_files`` in it are relative to the working directory.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from expo_serve.errors import ExpoError, ServeError, UsageError
from expo_serve.sweep.endpoint import Endpoint
from expo_serve.sweep.observations import Question
from expo_serve.sweep.scored import shorten

AT_ONCE = 32
"""Requests of the harness under way."""
_INSTALL = "pip install 'lm-eval[api]>=0.4.13'"
_OF_API = ("aiohttp", "tenacity", "requests")
"""What the harness imports to ask a server, and does not install without its extra ``api``."""
_MAIN_METRICS = ("acc_norm", "acc", "exact_match")
_SAMPLES = re.compile(r"samples_(.+)_\d{4}-\d\d-\d\dT[\d.-]+\.jsonl")
_NOT_FOUND = re.compile(r"^Tasks not found: (.+)", re.MULTILINE)
_EXCEPTION = re.compile(r"^(?:[\w]+\.)*\w*(?:Error|Exception|Exit)\b.*")
_ANSWER_SECONDS = 3600
"""Of one request: it may wait for a whole batch of others."""


class _AnyTag(yaml.SafeLoader):
    """Reads task files, whose tags name functions of the harness's."""


_AnyTag.add_multi_constructor("!", lambda loader, suffix, node: suffix)


def check_lm_eval(tasks: Sequence[str]) -> None:
    """Check that the harness is there and has these tasks, before an engine starts; takes some seconds.

    Args:
        tasks: names of the harness, or ``.yaml`` files.

    Raises:
        UsageError: the harness is not installed, or a task is not there.
    """
    command = _command()
    for task in tasks:
        if task.endswith((".yaml", ".yml")):
            _check_file(Path(task))
    names = [task for task in tasks if not task.endswith(".yaml") and not glob.has_magic(task)]
    if not names:
        return
    checked = subprocess.run(
        [*command, "validate", "--tasks", ",".join(names)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        env=_environment(),
    )
    if missing := _NOT_FOUND.search(checked.stdout):
        raise UsageError(
            f"--lm-eval: lm-evaluation-harness has no task {missing[1]}; `{shorten(' '.join(command))} ls tasks` lists "
            "them, a file of one's own ends in .yaml"
        )
    if checked.returncode:
        raise UsageError(f"--lm-eval: lm-evaluation-harness does not run: {_cause(checked.stdout)} (try {_INSTALL})")


def run_lm_eval(tasks: Sequence[str], endpoint: Endpoint, out: Path, *, at_once: int = AT_ONCE) -> Iterator[Question]:
    """Let the harness ask an engine, and yield each question's score.

    Args:
        tasks: names of the harness, or ``.yaml`` files.
        endpoint: the engine, pinned to an alpha, with its tokenizer.
        out: folder for the harness's log and results; results of an earlier run are replaced.
        at_once: requests at once.

    Raises:
        UsageError: the harness is not installed.
        ServeError: the engine does not answer.
        ExpoError: the harness failed, or a task has no metric for each question.
    """
    if endpoint.alpha is None:
        raise ValueError("the endpoint is pinned to no alpha")
    results, log = out / "results", out / "lm-eval.log"
    config = {
        "model": "local-completions",
        "model_args": _model_arguments(endpoint, at_once),
        "tasks": [glob.escape(str(Path(task).resolve())) if task.endswith(".yaml") else task for task in tasks],
        "output_path": str(results.resolve()),
        "log_samples": True,
    }
    with _writing(out):
        shutil.rmtree(results, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        code = _run(config, log, endpoint.key)
        _hide(endpoint.key, results)
    if code:
        cause = _cause(log.read_text(encoding="utf-8", errors="replace"))
        raise ExpoError(f"lm-evaluation-harness failed: {cause} (its log: {log}); go on with --resume")
    samples = {match[1]: file for file in sorted(results.rglob("*")) if (match := _SAMPLES.fullmatch(file.name))}
    if not samples:
        raise ExpoError(f"lm-evaluation-harness left no samples of {', '.join(tasks)} (its log: {log})")
    groups = _groups(tasks, results)
    for task, file in samples.items():
        yield from _questions(task, groups.get(task, task), file, float(endpoint.alpha))


def _command() -> list[str]:
    """Return the command of the harness: of this Python, else on the PATH.

    Raises:
        UsageError: there is none.
    """
    if (spec := importlib.util.find_spec("lm_eval")) and spec.origin:  # no mere folder of that name
        if missing := [name for name in _OF_API if not importlib.util.find_spec(name)]:
            raise UsageError(f"--lm-eval: lm-evaluation-harness lacks {', '.join(missing)}; {_INSTALL}")
        return [sys.executable, "-m", "lm_eval"]
    if found := shutil.which("lm_eval"):
        return [found]
    raise UsageError(f"--lm-eval needs lm-evaluation-harness: {_INSTALL}")


def _environment() -> dict[str, str]:
    # A folder named like it must not shadow the harness; its last words are logged, even if it is killed.
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def _check_file(file: Path) -> None:
    """Refuse a file that is not a task's.

    Raises:
        UsageError: it is not.
    """
    if file.suffix == ".yml":
        raise UsageError(f"--lm-eval: {file}: lm-evaluation-harness takes files that end in .yaml only; rename it")
    try:
        content = yaml.load(file.read_bytes(), Loader=_AnyTag)
    except (OSError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else shorten(str(error))
        raise UsageError(f"--lm-eval: {file} cannot be read: {reason}") from None
    if not isinstance(content, dict) or not content.keys() & {"task", "group", "include"}:
        raise UsageError(f"--lm-eval: {file} is not a task of lm-evaluation-harness: expected a key `task`")


def _model_arguments(endpoint: Endpoint, at_once: int) -> dict[str, Any]:
    """Return what the harness's client is made with.

    Raises:
        ServeError: the engine does not answer.
    """
    arguments = {
        "base_url": f"{endpoint.url}/completions",
        "model": endpoint.model,
        "tokenizer": endpoint.tokenizer,
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
        "num_concurrent": max(2, at_once),  # with one it takes another way, through proxies of the environment
        "timeout": _ANSWER_SECONDS,
        "header": endpoint.headers,  # it replaces the harness's own with the key
    }
    try:
        with httpx.Client(headers=endpoint.headers, timeout=60, trust_env=False) as http:
            served = http.get(f"{endpoint.url}/models").raise_for_status().json()["data"][0]
            if length := served.get("max_model_len"):
                arguments["max_length"] = length
            arguments["add_bos_token"] = _begins_with_special_token(http, endpoint)
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise ServeError(f"the engine does not answer: {type(error).__name__} {shorten(str(error))}") from None
    return arguments


def _begins_with_special_token(http: httpx.Client, endpoint: Endpoint) -> bool:
    """Return whether the server begins a text with a token of its own; False where it does not say."""
    counts = []
    for special in (True, False):
        body = {"model": endpoint.model, "prompt": "a", "add_special_tokens": special}
        answer = http.post(f"{endpoint.url.removesuffix('/v1')}/tokenize", json=body)
        if answer.status_code != 200:
            return False
        counts.append(int(answer.json()["count"]))
    return counts[0] > counts[1]


def _run(config: dict[str, Any], log: Path, key: str | None) -> int:
    """Run the harness to its end, and write what it prints into the log; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="expo-lm-eval-") as folder, log.open("wb") as output:
        file = Path(folder, "config.yaml")  # not on the command line, where others would see the key
        file.write_text(json.dumps(config), encoding="utf-8")
        process = subprocess.Popen(
            [*_command(), "run", "--config", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,  # Ctrl-C at a terminal reaches only this process, which ends it
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                output.write(line.replace(key.encode(), b"***") if key else line)
            return process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()


def _hide(key: str | None, folder: Path) -> None:
    """Take the key out of the results: the harness writes down what its client was made with."""
    for file in folder.rglob("*.json*") if key else ():
        text = file.read_text(encoding="utf-8")
        if key and key in text:
            file.write_text(text.replace(key, "***"), encoding="utf-8")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExpoError(
            f"lm-evaluation-harness: {error.filename or folder} cannot be written: {error.strerror}; make room, then "
            "go on with --resume"
        ) from None


def _cause(output: str) -> str:
    """Return the line that says why the harness ended: the last exception, else the last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", output) if line.strip()]
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    return shorten((exceptions or lines or ["it printed nothing"])[-1])


def _groups(tasks: Sequence[str], results: Path) -> dict[str, str]:
    """Return the group that was asked for, by the tasks that it consists of: as a whole it is one capability."""
    found: dict[str, str] = {}
    for file in results.rglob("results_*.json"):
        parts: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8")).get("group_subtasks", {})
        for group in tasks:
            left = list(parts.get(group, []))
            while left:
                task = left.pop()
                found[task] = group
                left += parts.get(task, [])
    return found


def _questions(part: str, task: str, file: Path, alpha: float) -> Iterator[Question]:
    """Yield the scores of a task's samples, or of a part of a group; those that are not finite are left out."""
    first_filter: Any = None
    for line in file.read_bytes().splitlines():  # of bytes: a text has further line breaks, which JSON does not escape
        sample = json.loads(line)
        first_filter = first_filter or sample["filter"]
        if sample["filter"] != first_filter:
            continue
        score = _main_score(part, sample)
        if math.isfinite(score):
            question = str(sample["doc_id"]) if part == task else f"{part}:{sample['doc_id']}"
            yield Question(alpha=alpha, task=task, question=question, correct=score)


def _main_score(task: str, sample: dict[str, Any]) -> float:
    """Return a question's score of the main metric.

    Raises:
        ExpoError: the task has no metric for each question.
    """
    for metric in (*_MAIN_METRICS, *sample["metrics"]):
        if isinstance(value := sample.get(metric), int | float):
            return float(value)
    raise ExpoError(
        f"--lm-eval: task {task} has no score for each question, only over all of them "
        f"({', '.join(sample['metrics'])}); give tasks with acc, acc_norm or exact_match"
    )
