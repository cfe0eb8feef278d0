"""Where does the time of a start go, and what of it is ours?

expo-serve on the pair and plain vLLM on the merged checkpoint, in turn. The log is watched: a phase ends when the line
comes that closes it, so processes, imports and configuration are seen as a user sees them. What is ours is the report's
`resolve` and `weights` beside vLLM's own line, and what the command does before vLLM begins. Compiling the loops goes
on in a thread meanwhile; what it costs the first start of a node and later ones is measured apart, without a model.

    python -m loadtests.phases [--size demo] [--rounds 3]
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from loadtests.kernels import compile_seconds, show_compile_seconds
from loadtests.page_cache import warm
from loadtests.pairs import Pair, pair_of, weight_files
from loadtests.results import parser, save, shown, spread, table, turns, workplace
from loadtests.servers import ended, expo_server, first_answer, merge_by_us, plain_server, weights_seconds
from tests.server import Server

# A phase, and what the log says when it is over; the last two have no line.
_MARKS = (
    ("command and imports", "non-default args"),
    ("model's configuration", "Enabled custom fusions"),
    ("engine process", "Initializing a V1 LLM engine"),
    ("worker process", "Starting to load model"),
    ("model build", "Initializing model took"),
    ("weights", "Loading weights took"),
    ("packing, cache, warm-up", "init engine (profile"),
)
PHASES = (*(name for name, _ in _MARKS), "endpoints", "first answer")
_POLL_SECONDS = 0.02


class LogWatch:
    """Notes when each mark is first seen in a growing log."""

    def __init__(self, log: Path) -> None:
        self.seen: dict[str, float] = {}
        self._log = log
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> LogWatch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_POLL_SECONDS):
            text = self._log.read_text(errors="replace") if self._log.exists() else ""
            now = time.perf_counter()
            for name, mark in _MARKS:
                if mark in text:
                    self.seen.setdefault(name, now)


def measure(pair: Pair, rounds: int, work: Path) -> dict[str, Any]:
    """Starts in turn."""
    merged = merge_by_us(pair, work / "merged", work / "merge.log")
    runs: dict[str, list[dict[str, float]]] = {"expo": [], "plain": []}
    ours: list[dict[str, float]] = []
    for name in turns(list(runs), rounds):
        warm([*pair.files, *weight_files(merged)])
        log = work / f"{name}.log"
        log.unlink(missing_ok=True)
        started = time.perf_counter()
        with LogWatch(log) as watch:
            server = expo_server(pair, log) if name == "expo" else plain_server(merged, log)
            with ended(server):
                runs[name].append(_phases(server, watch, started))
                if name == "expo":
                    ours.append(server.get("/v1/expo").json()["ranks"][0]["phase_seconds"])
    keys = (*PHASES, "all", "weights, as said")
    return {
        "side_bytes": pair.side_bytes,
        "phases": {name: {key: spread([run[key] for run in own]) for key in keys} for name, own in runs.items()},
        "report_phase_seconds": {key: spread([run[key] for run in ours]) for key in ours[0]},
        "compile_seconds": compile_seconds(rounds),
    }


def _phases(server: Server, watch: LogWatch, started: float) -> dict[str, float]:
    server.wait_ready()
    ready = time.perf_counter()
    first_answer(server)
    answered = time.perf_counter()
    # Two lines of one moment may be seen in one look at the log; a mark that never came ends where the next one does.
    ends = [watch.seen.get(name) for name, _ in _MARKS] + [ready, answered]
    for place in range(len(ends) - 2, -1, -1):
        ends[place] = ends[place] or ends[place + 1]
    times = [started, *(end for end in ends if end is not None)]
    lengths = {name: times[place + 1] - times[place] for place, name in enumerate(PHASES)}
    return {**lengths, "all": answered - started, "weights, as said": weights_seconds(server)}


def show(size: str, figures: dict[str, Any]) -> str:
    """The figures of one size as a table; the difference is that of the medians."""
    expo, plain = figures["phases"]["expo"], figures["phases"]["plain"]
    rows = [
        (size, key, shown(expo[key]), shown(plain[key]), f"{expo[key]['median'] - plain[key]['median']:+.2f}")
        for key in expo
    ]
    rows += [(size, f"report: {key}", shown(own), "", "") for key, own in figures["report_phase_seconds"].items()]
    phases = table(("pair", "phase", "expo-serve, s", "plain vLLM, s", "difference"), rows)
    return f"{phases}\n\n{show_compile_seconds(figures['compile_seconds'])}"


def main() -> None:
    """Measure one size, print the figures, add them to the result file."""
    options = parser(__doc__, size="demo", rounds=3).parse_args()
    with pair_of(options.size, options.work, options.keep) as pair, workplace(options.work, "phases") as place:
        figures = measure(pair, options.rounds, place)
    save("phases", options.size, figures, options.results)
    print(show(options.size, figures))


if __name__ == "__main__":
    main()
