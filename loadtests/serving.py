"""Does a model that expo-serve loaded serve as fast as the same weights under plain vLLM?

Both servers are started once and stay; runs of vLLM's own `bench serve` (a fixed number of prompts, new ones in every
round, the same for both) go to the one and to the other in turn, who begins changes, and nobody else is asked
meanwhile. Throughput in tokens, and the medians of the time to the first token (TTFT) and of the time for each further
one (TPOT), as ratios pair by pair with the 95% interval of their mean (Student's t). expo-serve checks a header and
adds one: if that cost anything, the interval would not contain 1.

    python -m loadtests.serving [--size demo] [--rounds 10] [--prompts 40]
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from loadtests.pairs import Pair, pair_of
from loadtests.results import parser, save, shown, spread, table, turns, workplace
from loadtests.servers import MODEL, ended, expo_server, first_answer, merge_by_us, plain_server, run_watched
from tests.server import Server

_INPUT_TOKENS, _OUTPUT_TOKENS, _AT_ONCE = 128, 32, 8
_METRICS = ("total_token_throughput", "median_ttft_ms", "median_tpot_ms")
# Student's t, 97.5%, by degrees of freedom from 1: no package of the environment has its quantiles.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T_NORMAL = 2.131
"""For more than 16 runs: a little wide, never narrow."""


def measure(pair: Pair, rounds: int, prompts: int, work: Path) -> dict[str, Any]:
    """Runs in turn against both servers."""
    merged = merge_by_us(pair, work / "merged", work / "merge.log")
    runs: dict[str, list[dict[str, float]]] = {"expo": [], "plain": []}
    with ExitStack() as stack:
        servers = {
            "expo": stack.enter_context(ended(expo_server(pair, work / "expo.log"))),
            "plain": stack.enter_context(ended(plain_server(merged, work / "plain.log"))),
        }
        for server in servers.values():
            first_answer(server)
        for name in servers:  # warms up
            _bench(servers[name], merged, prompts, work, seed=rounds)
        for name in turns(list(servers), rounds):
            runs[name].append(_bench(servers[name], merged, prompts, work, seed=len(runs[name])))
    series = {name: {key: [run[key] for run in own] for key in _METRICS} for name, own in runs.items()}
    return {
        "prompts": prompts,
        "input_tokens": _INPUT_TOKENS,
        "output_tokens": _OUTPUT_TOKENS,
        "at_once": _AT_ONCE,
        "run_seconds": {name: spread([run["duration"] for run in own]) for name, own in runs.items()},
        "servers": {name: {key: spread(own) for key, own in figures.items()} for name, figures in series.items()},
        "expo_to_plain": {
            key: _interval([a / b for a, b in zip(series["expo"][key], series["plain"][key], strict=True)])
            for key in _METRICS
        },
    }


def _interval(ratios: Sequence[float]) -> dict[str, Any]:
    """The spread of ratios, and the 95% interval of their mean where there are two at least."""
    mean = statistics.fmean(ratios)
    if len(ratios) < 2:
        return {**spread(ratios), "mean": mean, "interval": None}
    quantile = _T[len(ratios) - 2] if len(ratios) - 2 < len(_T) else _T_NORMAL
    half = quantile * statistics.stdev(ratios) / math.sqrt(len(ratios))
    return {**spread(ratios), "mean": mean, "interval": [mean - half, mean + half]}


def _bench(server: Server, tokenizer: Path, prompts: int, work: Path, seed: int) -> dict[str, float]:
    """One run of vLLM's benchmark. The prompts hang on the seed: none stands in the cache of prefixes already."""
    flags = {
        "--base-url": server.url,
        "--model": MODEL,
        "--tokenizer": tokenizer,
        "--dataset-name": "random",
        "--random-input-len": _INPUT_TOKENS,
        "--random-output-len": _OUTPUT_TOKENS,
        "--num-prompts": prompts,
        "--max-concurrency": _AT_ONCE,
        "--seed": seed,
        "--temperature": 0,
        "--result-dir": work,
        "--result-filename": "run.json",
    }
    words = [str(word) for flag in flags.items() for word in flag]
    command = [sys.executable, "-m", "loadtests.vllm_bench", *words, "--ignore-eos", "--save-result", "--disable-tqdm"]
    run_watched(command, work / "bench.log")
    answer = json.loads((work / "run.json").read_text())
    if answer["completed"] != prompts:
        raise RuntimeError(f"only {answer['completed']} of {prompts} requests were answered")
    return {key: float(answer[key]) for key in (*_METRICS, "duration")}


def show(size: str, figures: dict[str, Any]) -> str:
    """The figures of one size as a table."""
    rows = []
    for key in _METRICS:
        ratio = figures["expo_to_plain"][key]
        interval = " to ".join(f"{end:.3f}" for end in ratio["interval"]) if ratio["interval"] else "one run"
        sides = [shown(figures["servers"][name][key], 1) for name in ("expo", "plain")]
        rows.append((size, key, *sides, f"{ratio['mean']:.3f}", interval))
    return table(("pair", "figure", "expo", "plain", "mean ratio", "95% interval"), rows)


def main() -> None:
    """Measure one size, print the figures, add them to the result file."""
    options = parser(__doc__, size="demo", rounds=10)
    options.add_argument("--prompts", type=int, default=40, help="requests in a run, default 40")
    chosen = options.parse_args()
    with pair_of(chosen.size, chosen.work, chosen.keep) as pair, workplace(chosen.work, "serving") as place:
        figures = measure(pair, chosen.rounds, chosen.prompts, place)
    save("serving", chosen.size, figures, chosen.results)
    print(show(chosen.size, figures))


if __name__ == "__main__":
    main()
