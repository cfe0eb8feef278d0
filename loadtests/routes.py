"""From two checkpoints to the first answer: expo-serve, or a merge written to disk and plain vLLM on the result.

Three routes in turn: expo-serve; mergekit; the ExPO authors' algorithm. For each: seconds of the merge, of the weights
in vLLM, and of all until the OpenAI endpoint has answered; the peak memory (resident, all processes); bytes written to
disk. Then as many alphas as given: every merge is really run, and removed when its size is known. The inputs are in
the page cache.

    python -m loadtests.routes [--size demo] [--rounds 3] [--alphas 8]
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from loadtests.merges import Merge, authors, installed, mergekit
from loadtests.page_cache import warm
from loadtests.pairs import Pair, pair_of
from loadtests.results import ALPHA, parser, ratio_spread, save, shown, spread, table, turns, workplace
from loadtests.servers import PeakMemory, ended, expo_server, first_answer, plain_server, weights_seconds
from tests.server import Server

COUNTS = (1, 4, 8)
_SERIES = ("merge_seconds", "weights_seconds", "start_seconds", "total_seconds", "peak_resident_bytes", "written_bytes")
_NOTHING = {"seconds": 0.0, "peak_resident_bytes": 0, "written_bytes": 0}


def measure(pair: Pair, rounds: int, alphas: int, work: Path, place: Path) -> dict[str, Any]:
    """All routes of one pair; ``work`` keeps mergekit's environment, ``place`` takes the checkpoints."""
    merges: dict[str, Merge | None] = {"expo": None, "mergekit": mergekit(work), "authors": authors}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in merges}
    for name in turns(list(merges), rounds):
        warm(pair.files)
        runs[name].append(_route(merges[name], pair, place))
    series = {name: {key: [run[key] for run in own] for key in _SERIES} for name, own in runs.items()}
    others = [name for name in merges if name != "expo"]
    expo = series["expo"]
    phases = {name: [sum(run[key] for key in _SERIES[:2]) for run in runs[name]] for name in others}
    return {
        "side_bytes": pair.side_bytes,
        "mergekit_environment": installed(work),
        "answers": {name: own[-1]["answer"] for name, own in runs.items()},
        "routes": {name: {key: spread(own) for key, own in figures.items()} for name, figures in series.items()},
        "total_to_expo": {name: ratio_spread(series[name]["total_seconds"], expo["total_seconds"]) for name in others},
        "weights_phase_to_expo": {name: ratio_spread(phases[name], expo["weights_seconds"]) for name in others},
        "alphas": {name: _many(merge, pair, alphas, place) for name, merge in merges.items() if merge},
    }


def _route(merge: Merge | None, pair: Pair, place: Path) -> dict[str, Any]:
    """One way once, from two checkpoints to the first answer."""
    out = place / "merged"
    started = time.perf_counter()
    merged = merge(pair, ALPHA, out) if merge else _NOTHING
    started_server = time.perf_counter()
    server = plain_server(out, place / "server.log") if merge else expo_server(pair, place / "server.log")
    served = _served(server)
    ready = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    return {
        "merge_seconds": merged["seconds"],
        "weights_seconds": served["weights_seconds"],
        "start_seconds": ready - started_server - served["aftermath_seconds"],
        "total_seconds": ready - started - served["aftermath_seconds"],
        "peak_resident_bytes": max(merged["peak_resident_bytes"], served["peak_resident_bytes"]),
        "written_bytes": merged["written_bytes"],
        "answer": served["answer"],
    }


def _served(server: Server) -> dict[str, Any]:
    """The first answer; what comes after it, such as the server's end, belongs to no route."""
    with ended(server), PeakMemory(server.process.pid) as peak:
        answer = first_answer(server)
        answered = time.perf_counter()
        seconds = weights_seconds(server)
    return {
        "answer": answer,
        "weights_seconds": seconds,
        "peak_resident_bytes": peak.bytes,
        "aftermath_seconds": time.perf_counter() - answered,
    }


def _many(merge: Merge, pair: Pair, alphas: int, place: Path) -> dict[str, Any]:
    """One checkpoint after the other, each for another alpha."""
    runs = []
    for number in range(alphas):
        out = place / "merged"
        runs.append(merge(pair, (number + 1) / 10, out))
        shutil.rmtree(out)
    counts = [count for count in COUNTS if count <= alphas]
    return {
        "merge_seconds": {count: sum(run["seconds"] for run in runs[:count]) for count in counts},
        "written_bytes": {count: sum(run["written_bytes"] for run in runs[:count]) for count in counts},
        "runs": runs,
    }


def show(size: str, figures: dict[str, Any]) -> str:
    """The figures of one size as two tables."""
    scales = {"peak_resident_bytes": 1e9, "written_bytes": 1e9}
    head = ("pair", "route", "merge, s", "weights, s", "server start to answer, s", "all, s", "peak, GB", "disk, GB")
    rows = [
        (size, name, *(shown(own[key], 2, scales.get(key, 1)) for key in _SERIES))
        for name, own in figures["routes"].items()
    ]
    many = [
        (size, name, count, f"{seconds:.1f}", f"{own['written_bytes'][count] / 1e9:.2f}")
        for name, own in figures["alphas"].items()
        for count, seconds in own["merge_seconds"].items()
    ]
    return table(head, rows) + "\n\n" + table(("pair", "route", "alphas", "merges, s", "disk, GB"), many)


def main() -> None:
    """Measure one size, print the figures, add them to the result file."""
    options = parser(__doc__, size="demo", rounds=3)
    options.add_argument("--alphas", type=int, default=8, help="how many alphas are merged in the end, default 8")
    chosen = options.parse_args()
    with pair_of(chosen.size, chosen.work, chosen.keep) as pair, workplace(chosen.work, "routes") as place:
        figures = measure(pair, chosen.rounds, chosen.alphas, chosen.work, place)
    save("routes", chosen.size, figures, chosen.results)
    print(show(chosen.size, figures))


if __name__ == "__main__":
    main()
