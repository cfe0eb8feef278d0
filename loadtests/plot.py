"""Draws results/load_time.png from the result files: seconds over size for each loader, and the routes beside it.

python -m loadtests.plot [--size 1.1b]
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from loadtests.results import parser, read
from loadtests.summary import MAIN_SIZE, main_size

_COLOURS = {"plain": "tab:blue", "plain2": "tab:cyan", "expo": "tab:red", "runai": "tab:green"}
_NAMES = {
    "plain": "plain vLLM, one side",
    "plain2": "plain vLLM, two torch threads",
    "expo": "expo-serve, the pair",
    "runai": "runai_streamer, one side",
}
_PARTS = (("merge_seconds", "merge"), ("weights_seconds", "weights"), ("start_seconds", "the rest of the start"))


def draw(folder: Path, wanted: str) -> Path:
    """Draw what was measured."""
    # Not imported at the top: type checking has to pass where the packages of `make bench` are not installed.
    matplotlib = import_module("matplotlib")
    matplotlib.use("Agg")
    plots = import_module("matplotlib.pyplot")
    figure, (left, right) = plots.subplots(1, 2, figsize=(12, 5), width_ratios=(3, 2))
    _draw_loads(left, read("load_time", folder))
    _draw_routes(right, read("routes", folder), wanted)
    figure.tight_layout()
    out = folder / "load_time.png"
    figure.savefig(out, dpi=120)
    return out


def _draw_loads(axes: Any, results: dict[str, Any]) -> None:
    sizes = sorted(results.values(), key=lambda own: int(own["weight_bytes"]))
    for state, style in (("warm", "-o"), ("cold", "--s")):
        measured = [own for own in sizes if state in own]
        for name, colour in _COLOURS.items():
            points = [own for own in measured if name in own[state]["seconds"]]
            if not points:
                continue
            series = [own[state]["seconds"][name] for own in points]
            axes.errorbar(
                [own["weight_bytes"] / 1e9 for own in points],
                [one["median"] for one in series],
                [[one["median"] - one["min"] for one in series], [one["max"] - one["median"] for one in series]],
                fmt=style,
                color=colour,
                capsize=2,
                label=f"{_NAMES[name]}, {state}",
            )
    axes.set(title="Loading weights", xlabel="GB a side", ylabel="seconds, median (min to max)", xlim=0, ylim=0)
    if axes.has_data():
        axes.legend(fontsize=8)


def _draw_routes(axes: Any, results: dict[str, Any], wanted: str) -> None:
    if not results:
        axes.set(title="routes: not measured")
        return
    size = main_size(results, wanted)
    routes = results[size]["routes"]
    below = dict.fromkeys(routes, 0.0)
    for key, label in _PARTS:
        heights = {name: own[key]["median"] for name, own in routes.items()}
        if key == "start_seconds":  # the weights are a part of the start
            heights = {name: height - routes[name]["weights_seconds"]["median"] for name, height in heights.items()}
        axes.bar(list(routes), list(heights.values()), bottom=list(below.values()), label=label)
        below = {name: below[name] + height for name, height in heights.items()}
    axes.set(title=f"Two checkpoints to the first answer, {size}", ylabel="seconds")
    axes.legend(fontsize=8)


def main() -> None:
    """Draw and say where."""
    options = parser(__doc__, size=MAIN_SIZE, rounds=0).parse_args()
    print(f"wrote {draw(options.results, options.size)}")


if __name__ == "__main__":
    main()
