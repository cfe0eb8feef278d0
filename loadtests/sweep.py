"""A whole sweep on the demo's pair, and a greedy one beside a server of its own for every alpha.

The demo's 40 held-out questions, its list reward, eight alphas. The first sweep samples as the command does by default
and is timed; the second is greedy, and each of its answers must be the one that an independent server gives. There both
take one request at a time and no prefix from the cache: requests that are computed together round differently.

    python -m loadtests.sweep [--copy DIR]
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from expo_serve.config import format_alpha
from expo_serve.sweep.observations import OBSERVATION, Answer
from expo_serve.sweep.results import SweepResult
from loadtests.results import parser, save, table, workplace
from loadtests.servers import ended
from tests.server import ENGINE_ENV, EXPO_SERVE, Server

DEMO = Path(__file__).parents[1] / "deploy/demo"
MODELS = Path(".demo").absolute()
ALPHAS = (0.0, 0.1, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0)
MAX_TOKENS = 256
BAR_SECONDS = 12 * 60
_FLAGS = ["--max-model-len", "1024", "--enforce-eager"]
_ONE_AT_A_TIME = ["--max-num-seqs", "1", "--no-enable-prefix-caching"]
_GREEDY_TOKENS = 24


def run(out: Path, *more: str) -> tuple[SweepResult, float]:
    """Sweep; returns the result and the seconds that the command took.

    Raises:
        RuntimeError: it failed.
    """
    command = [*EXPO_SERVE, "sweep", "--base", str(MODELS / "base"), "--aligned", str(MODELS / "aligned")]
    command += ["--prompts", "questions.jsonl", "--reward", "python:list_reward:reward", "--out", str(out.absolute())]
    command += ["--alphas", ",".join(map(format_alpha, ALPHAS)), *_FLAGS, *more]
    started = time.monotonic()
    done = subprocess.run(command, cwd=DEMO, env=ENGINE_ENV, text=True, capture_output=True, check=False)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"the sweep ended with {done.returncode}: {done.stderr[-2000:]}")
    print(done.stdout, flush=True)
    return SweepResult.model_validate_json((out / "sweep.json").read_text()), time.monotonic() - started


def answers_of_sweep(out: Path) -> dict[float, dict[int, str]]:
    """The answers of a sweep, by alpha and prompt."""
    found: dict[float, dict[int, str]] = {}
    for line in (out / "answers.jsonl").read_text().splitlines():
        one = OBSERVATION.validate_json(line)
        if isinstance(one, Answer):
            found.setdefault(one.alpha, {})[one.prompt] = one.text
    return found


def answers_of_server(alpha: float, log: Path) -> dict[int, str]:
    """The greedy answers of a server that serves one alpha, by prompt."""
    questions = [json.loads(line)["prompt"] for line in (DEMO / "questions.jsonl").read_text().splitlines()]
    sources = ["--base", str(MODELS / "base"), "--aligned", str(MODELS / "aligned"), "--alpha", format_alpha(alpha)]
    with ended(Server([*sources, *_FLAGS, *_ONE_AT_A_TIME, "--served-model-name", "demo"], log)) as server:
        server.wait_ready()

        def ask(question: str) -> str:
            messages = [{"role": "user", "content": question}]
            body = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": _GREEDY_TOKENS}
            answer = server.post("/v1/chat/completions", body).json()
            return str(answer["choices"][0]["message"]["content"])

        return dict(enumerate(map(ask, questions)))


def figures_of(result: SweepResult) -> dict[str, Any]:
    """What the page on choosing alpha shows of a sweep."""
    return {
        "prompts": len(result.prompts),
        "max_tokens": MAX_TOKENS,
        "engine_starts": result.timing.engine_starts,
        "start_seconds": result.timing.start_seconds,
        "recommendation": result.recommendation,
        "reason": result.decision.reason,
        "alphas": {
            format_alpha(one.alpha): {
                "load_seconds": one.load_seconds,
                "generate_seconds": one.generate_seconds,
                **{name: [found.value, found.low, found.high] for name, found in one.measures.items()},
                "effective_alpha": one.effective_alpha,
            }
            for one in result.alphas
        },
    }


def page_table(figures: dict[str, Any]) -> str:
    """The table of docs/choosing-alpha.md: measures with their 95% intervals."""
    shown = {"reward": 2, "reward_lc": 2, "kl": 4, "length": 0, "unfinished": 2}
    head = ["alpha", "effective alpha", "reward", "gain at equal length", "KL, nats a token", "tokens", "unfinished"]
    rows = [
        [alpha, f"{found['effective_alpha']:.2f}", *(_with_interval(found[name], shown[name]) for name in shown)]
        for alpha, found in figures["alphas"].items()
    ]
    return table(head, rows)


def _with_interval(found: list[float | None], digits: int) -> str:
    value, low, high = found
    if value is None or low is None or high is None:
        return "-" if value is None else f"{value:.{digits}f}"
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    """Sweep twice, ask eight servers, print and keep the figures."""
    options = parser(__doc__, size="demo", rounds=1)
    options.add_argument("--copy", type=Path, help="copy the folder of the first sweep there")
    given = options.parse_args()
    with workplace(given.work, "sweep") as work:
        result, seconds = run(work / "sampled")
        if given.copy:
            shutil.copytree(work / "sampled", given.copy)
        exact = ["--temperature", "0", "--max-tokens", str(_GREEDY_TOKENS), *_ONE_AT_A_TIME]
        greedy, greedy_seconds = run(work / "greedy", *exact)
        mine = answers_of_sweep(work / "greedy")
        differing = {}
        for alpha in ALPHAS:
            theirs = answers_of_server(alpha, work / f"server-{format_alpha(alpha)}.log")
            assert theirs.keys() == mine[alpha].keys()
            differing[format_alpha(alpha)] = sum(theirs[prompt] != mine[alpha][prompt] for prompt in theirs)
    figures = {
        **figures_of(result),
        "seconds": seconds,
        "greedy": {
            "seconds": greedy_seconds,
            "max_tokens": _GREEDY_TOKENS,
            "engine_starts": greedy.timing.engine_starts,
            "answers_that_differ_from_a_server": differing,
        },
    }
    save("sweep", given.size, figures, given.results)
    rows: list[list[object]] = [
        ["seconds of the sweep", f"{seconds:.0f}", f"at most {BAR_SECONDS}"],
        ["starts of the engine", result.timing.engine_starts, 1],
        ["greedy answers that differ from a server's", sum(differing.values()), 0],
    ]
    print(table(["figure", "value", "bar"], rows))


if __name__ == "__main__":
    main()
