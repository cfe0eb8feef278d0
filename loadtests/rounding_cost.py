"""What dithered rounding, effective alpha and `inspect --measure` cost, of a warm load of the pair.

In turn in one process, into parameters that were touched before: the load rounded to nearest; dithered, as by default;
dithered without the sample that effective alpha is measured on; and `inspect --measure`, which reads both sides and
counts. The ratios round by round are what counts.

    python -m loadtests.rounding_cost [--size demo|1.1b] [--rounds 15]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from expo_serve.config import ExpoConfig
from expo_serve.measure.sample import Sample
from expo_serve.plan.prepare import pin, prepare
from loadtests.loading import CONTENDERS, empty_model, load_once
from loadtests.machine import OthersAtWork
from loadtests.page_cache import warm
from loadtests.pairs import Pair, pair_of
from loadtests.results import ALPHA, parser, ratio_spread, save, shown, spread, table, turns

_ABOVE_BELOW = (("dithered", "nearest"), ("dithered", "unmeasured"), ("measure", "dithered"))
"""Pairs of ways whose ratio is of interest."""


def _sources(pair: Pair, rounding: str) -> dict[str, Any]:
    sides = {"base": str(pair.base), "aligned": str(pair.aligned)}
    config = ExpoConfig.model_validate({**sides, "alpha": ALPHA, "rounding": rounding})
    return pin(config, prepare(config), None).model_dump(mode="json", exclude_defaults=True)


def _unmeasured(load: Callable[[], float]) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sample, "__call__", lambda *arguments: None)
        return load()


def _inspected(pair: Pair) -> float:
    from expo_serve.measure.pair import measure_plan
    from expo_serve.progress import Progress

    config = ExpoConfig(base=str(pair.base), aligned=str(pair.aligned), alpha=ALPHA)
    started = time.perf_counter()
    measure_plan(prepare(config), config, Progress("", 0, on_terminal=False, is_shown=False))
    return time.perf_counter() - started


def measure(pair: Pair, rounds: int) -> dict[str, Any]:
    """All ways, in turn."""
    seconds: dict[str, list[float]] = {}
    with empty_model(pair.aligned) as (model, config):

        def load(rounding: str) -> float:
            return float(load_once(model, config, CONTENDERS["expo"], pair, _sources(pair, rounding))["seconds"])

        ways: dict[str, Callable[[], float]] = {
            "nearest": lambda: load("nearest"),
            "dithered": lambda: load("dithered"),
            "unmeasured": lambda: _unmeasured(lambda: load("dithered")),
            "measure": lambda: _inspected(pair),
        }
        for way in ways.values():  # the first time of each touches the parameters, imports and compiles
            way()
        with OthersAtWork() as others:
            for name in turns(list(ways), rounds):
                warm(pair.files)
                seconds.setdefault(name, []).append(ways[name]())
    return {
        "others_cores": others.cores,
        "seconds": {name: spread(found) for name, found in seconds.items()},
        "ratios": {f"{one} / {two}": ratio_spread(seconds[one], seconds[two]) for one, two in _ABOVE_BELOW},
    }


def main() -> None:
    """Measure one size, print the figures, add them to the result file."""
    options = parser(__doc__, size="1.1b", rounds=15).parse_args()
    with pair_of(options.size, options.work, options.keep) as pair:
        figures = measure(pair, options.rounds)
    save("rounding_cost", options.size, figures, options.results)
    print(table(["way", "seconds"], [[name, shown(found, 3)] for name, found in figures["seconds"].items()]))
    print(table(["ratio", "median (min to max)"], [[name, shown(found)] for name, found in figures["ratios"].items()]))


if __name__ == "__main__":
    main()
