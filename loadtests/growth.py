"""Does the time of a load grow with the pair's size, and no faster?

Seconds per GB of weights for each size that `load_time` measured, raw and marginal: the slope between a size and the
next smaller one, in which what every load costs alike cancels out. Reads the result file, measures nothing.

    python -m loadtests.growth
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from loadtests.results import parser, read, table

_NAMES = ("plain", "expo")


def growth(load_time: dict[str, Any]) -> dict[str, Any]:
    """Seconds per GB by loader and size, warm, and by how much the largest of them exceeds the smallest."""
    sizes = sorted(load_time, key=lambda size: int(load_time[size]["weight_bytes"]))
    gigabytes = {size: load_time[size]["weight_bytes"] / 1e9 for size in sizes}
    figures: dict[str, Any] = {"gigabytes": gigabytes}
    for name in _NAMES:
        seconds = {size: load_time[size]["warm"]["seconds"][name]["median"] for size in sizes}
        per_gigabyte = {size: seconds[size] / gigabytes[size] for size in sizes}
        marginal = {
            f"{small} to {large}": (seconds[large] - seconds[small]) / (gigabytes[large] - gigabytes[small])
            for small, large in pairwise(sizes)
        }
        figures[name] = {
            "seconds_per_gigabyte": per_gigabyte,
            "marginal_seconds_per_gigabyte": marginal,
            "excess": _excess(per_gigabyte),
            "marginal_excess": _excess(marginal),
        }
    return figures


def _excess(slopes: dict[str, float]) -> float | None:
    """By how much the largest exceeds the smallest; None where there is nothing to compare."""
    least = min(slopes.values(), default=0.0)
    return max(slopes.values()) / least - 1 if least > 0 and len(slopes) > 1 else None


def show(figures: dict[str, Any]) -> str:
    """The figures as a table."""
    keys = ("seconds_per_gigabyte", "marginal_seconds_per_gigabyte")
    rows = [
        (name, "raw" if key == keys[0] else "marginal", size, f"{value:.3f}")
        for name in _NAMES
        for key in keys
        for size, value in figures[name][key].items()
    ]
    return table(("loader", "slope", "pair", "seconds a GB"), rows)


def main() -> None:
    """Print what the result file says."""
    options = parser(__doc__, size="", rounds=0).parse_args()
    load_time = read("load_time", options.results)
    print(show(growth(load_time)) if load_time else "load_time has not run yet")


if __name__ == "__main__":
    main()
