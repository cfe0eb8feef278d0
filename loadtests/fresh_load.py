"""What does one load take and hold in a process that has loaded nothing before, as a worker at its start?

A process for every load, in turn. The parameters were not touched before, so their pages come with the load: anonymous
growth less their size is what the loader itself keeps, and the peak is that of a worker. Plain vLLM loads the aligned
checkpoint that base plus the deltas is. The two load formats of vLLM for GPUs are tried once, and what they say on CPU
is recorded.

    python -m loadtests.fresh_load [--size demo] [--rounds 3]
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from expo_serve.load.fill import compile_kernels
from loadtests.delta_load import Loads, files
from loadtests.deltas import Deltas, deltas_of
from loadtests.loading import GPU_CONTENDERS, contenders, empty_model, weight_bytes
from loadtests.page_cache import warm
from loadtests.pairs import Pair
from loadtests.results import parser, ratio_spread, save, shown, spread, table, turns
from tests.server import ENGINE_ENV

_TIMEOUT = 300
_MARK = "load: "
_DELTAS = ("lora16", "packed", "full")


def measure(deltas: Deltas, rounds: int) -> dict[str, Any]:
    """All loads of one size."""
    names = [*(name for name in contenders()[0] if name != "plain2"), *_DELTAS]  # threads change nothing about memory
    loads: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name in turns(names, rounds):
        warm(files(deltas, _way(name)))
        loads[name].append(_load_in_process(name, deltas))
    peaks = {name: [load["peak_resident_bytes"] for load in series] for name, series in loads.items()}
    kept = {name: [load["kept_bytes"] for load in series] for name, series in loads.items()}
    return {
        "side_bytes": deltas.pair.side_bytes,
        "seconds": {name: spread([load["seconds"] for load in series]) for name, series in loads.items()},
        "peak_resident_bytes": {name: spread(series) for name, series in peaks.items()},
        "kept_bytes": {name: spread(series) for name, series in kept.items()},
        "expo_kept_above_plain_bytes": spread([a - b for a, b in zip(kept["expo"], kept["plain"], strict=True)]),
        "expo_peak_to_plain": ratio_spread(peaks["expo"], peaks["plain"]),
        "to_plain": {
            name: ratio_spread(*([load["seconds"] for load in loads[each]] for each in (name, "plain")))
            for name in names
            if name != "plain"
        },
        "does_not_work_on_cpu": {name: _refusal(name, deltas) for name in GPU_CONTENDERS},
        "loads": loads,
    }


def _way(name: str) -> str:
    """The name that `delta_load` has for it."""
    return "pair" if name == "expo" else name


def _run(name: str, deltas: Deltas) -> subprocess.CompletedProcess[str]:
    places = deltas.pair.base, deltas.pair.aligned, deltas.folder
    command = [sys.executable, "-m", "loadtests.fresh_load", "--child", name, deltas.size, *map(str, places)]
    return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False, env=ENGINE_ENV)


def _load_in_process(name: str, deltas: Deltas) -> dict[str, Any]:
    done = _run(name, deltas)
    if done.returncode:
        raise RuntimeError(f"loading by {name} failed:\n{done.stderr[-4000:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith(_MARK))
    figures: dict[str, Any] = json.loads(line.removeprefix(_MARK))
    return figures


def _refusal(name: str, deltas: Deltas) -> str | None:
    """The last line of a failed load's traceback; None if it worked after all."""
    done = _run(name, deltas)
    lines = [line for line in done.stderr.splitlines() if line and not line[0].isspace()]
    return (lines or [f"exit code {done.returncode}"])[-1] if done.returncode else None


def _child(name: str, deltas: Deltas) -> None:
    compile_kernels({"lora16": "lora", "packed": "packed"}.get(name))  # a worker does while it builds the model
    with empty_model(deltas.pair.aligned) as (model, config):
        figures = Loads(deltas, model, config).once(_way(name))
        size = weight_bytes(model)
    kept = figures["anonymous_growth_bytes"] - size
    print(f"\n{_MARK}{json.dumps({**figures, 'weight_bytes': size, 'kept_bytes': kept})}", flush=True)


def show(size: str, figures: dict[str, Any]) -> str:
    """The figures of one size as a table."""
    rows: list[tuple[str, ...]] = [
        (
            size,
            name,
            shown(figures["seconds"][name], 3),
            shown(figures["kept_bytes"][name], 1, 2**20),
            shown(figures["peak_resident_bytes"][name], 0, 2**20),
        )
        for name in figures["seconds"]
    ]
    rows += [(size, name, f"`{reason}`", "", "") for name, reason in figures["does_not_work_on_cpu"].items()]
    return table(("pair", "loader", "seconds", "anonymous above the weights, MiB", "peak resident, MiB"), rows)


def main() -> None:
    """Measure one size, print the figures, add them to the result file."""
    if sys.argv[1:2] == ["--child"]:
        name, size, *places = sys.argv[2:]
        base, aligned, folder = map(Path, places)
        _child(name, Deltas(size, Pair(size, base, aligned), folder))
        return
    options = parser(__doc__, size="demo", rounds=3).parse_args()
    with deltas_of(options.size, options.work, options.keep) as deltas:
        figures = measure(deltas, options.rounds)
    save("fresh_load", options.size, figures, options.results)
    print(show(options.size, figures))


if __name__ == "__main__":
    main()
