"""How long loading a pair takes, against plain vLLM's load of the aligned side alone and against a peer.

All fill the same model in this process, in turn, into parameters that were touched before. Who begins changes from
round to round. The limit is that of `roofline`, in the same run. Warm: all files are in the page cache before every
load, which is checked. Cold: they are dropped before every load; `storage` is then what reading aligned's files takes.
The ratios round by round are what counts; machines are noisy.

    python -m loadtests.load_time [--size demo|0.5b|1.1b|3b] [--rounds 9] [--cold-rounds 5]
"""

from __future__ import annotations

from typing import Any

from loadtests import roofline
from loadtests.loading import CONTENDERS, contenders, empty_model, load_once, weight_bytes
from loadtests.machine import OthersAtWork
from loadtests.page_cache import drop, read_all, resident_share, warm
from loadtests.pairs import Pair, pair_of, weight_files
from loadtests.results import parser, ratio_spread, save, shown, spread, table, turns

_Loads = dict[str, list[dict[str, Any]]]


def measure(pair: Pair, rounds: int, cold_rounds: int) -> dict[str, Any]:
    """All loads of one pair, warm and cold."""
    names, skipped = contenders()
    with empty_model(pair.aligned) as (model, config):
        for name in names:  # the first time of each touches the parameters, imports and compiles
            load_once(model, config, CONTENDERS[name], pair)
        figures: dict[str, Any] = {
            "side_bytes": pair.side_bytes,
            "weight_bytes": weight_bytes(model),
            "skipped": skipped,
            "warm": _warm(names, model, config, pair, rounds),
        }
        limit = roofline.measure(pair, max(2, rounds // 3))["limit"]
        loads = figures["warm"]["seconds"]["expo"]["all"]
        figures["limit"] = {**limit, "expo_to_limit": spread([seconds / limit["seconds"] for seconds in loads])}
        if cold_rounds:
            figures["cold"] = _cold(names, model, config, pair, cold_rounds)
    return figures


def _warm(names: list[str], model: Any, config: Any, pair: Pair, rounds: int) -> dict[str, Any]:
    loads: _Loads = {name: [] for name in names}
    least = 1.0
    with OthersAtWork() as others:
        for name in turns(names, rounds):
            least = min(least, warm(pair.files))
            loads[name].append(load_once(model, config, CONTENDERS[name], pair))
    return {"least_resident_share": least, "others_cores": others.cores, **_summary(loads)}


def _cold(names: list[str], model: Any, config: Any, pair: Pair, rounds: int) -> dict[str, Any]:
    loads: _Loads = {name: [] for name in names}
    storage: list[float] = []
    most = 0.0
    with OthersAtWork() as others:
        for name in turns([*names, "storage"], rounds):
            drop(pair.files)
            most = max(most, resident_share(pair.files))
            if name == "storage":
                storage.append(read_all(weight_files(pair.aligned)))
            else:
                loads[name].append(load_once(model, config, CONTENDERS[name], pair))
    return {
        "most_resident_share": most,
        "others_cores": others.cores,
        "storage_seconds": spread(storage),
        **_summary(loads),
    }


def _summary(loads: _Loads) -> dict[str, Any]:
    seconds = {name: [load["seconds"] for load in series] for name, series in loads.items()}
    peaks = {name: [load["peak_resident_bytes"] for load in series] for name, series in loads.items()}
    return {
        "seconds": {name: spread(series) for name, series in seconds.items()},
        "expo_to": {name: ratio_spread(seconds["expo"], seconds[name]) for name in loads if name != "expo"},
        "expo_peak_to_plain": ratio_spread(peaks["expo"], peaks["plain"]),
        "loads": loads,
    }


def show(size: str, figures: dict[str, Any]) -> str:
    """The figures of one size as a table."""
    rows = [
        (size, state, name, shown(series, 3), shown(figures[state]["expo_to"].get(name)) if name != "expo" else "")
        for state in ("warm", "cold")
        if state in figures
        for name, series in figures[state]["seconds"].items()
    ]
    if limit := figures.get("limit"):
        rows.append((size, "warm", f"limit: {limit['way']}", f"{limit['seconds']:.3f}", shown(limit["expo_to_limit"])))
    return table(("pair", "page cache", "loader", "seconds", "expo / this one"), rows)


def main() -> None:
    """Measure one size, print the figures, add them to the result file."""
    options = parser(__doc__, size="demo", rounds=9)
    options.add_argument("--cold-rounds", type=int, default=5, help="default 5; 0 leaves the cold loads out")
    chosen = options.parse_args()
    with pair_of(chosen.size, chosen.work, chosen.keep) as pair:
        figures = measure(pair, chosen.rounds, chosen.cold_rounds)
    save("load_time", chosen.size, figures, chosen.results)
    print(show(chosen.size, figures))


if __name__ == "__main__":
    main()
