"""The figures against their bars, from the result files, as one table.

python -m loadtests.summary [--size 1.1b]      print it and write results/summary.md
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from loadtests.growth import growth
from loadtests.results import parser, read, shown, table

MAIN_SIZE = "1.1b"
SCRIPTS = ("load_time", "delta_load", "check_cost", "fresh_load", "ranks", "routes", "serving", "phases", "answers")
_MIB = 2**20
_QUIET_CORES = 0.2
Row = tuple[str, str, str, str]
_Results = dict[str, dict[str, Any]]


def main_size(results: dict[str, Any], wanted: str) -> str:
    """The size that the table speaks of: the wanted one, or where it was not measured the largest."""
    return wanted if wanted in results else max(results, key=lambda size: int(results[size]["side_bytes"]))


def rows(results: _Results, wanted: str) -> list[Row]:
    """Question, figure, bar, verdict; what was not measured says so."""
    return [
        *_guarded("load of the pair, warm and cold", _load_rows, results, wanted),
        *_guarded("load of base plus a delta", _delta_rows, results, wanted),
        *_guarded("cost of looking at every value", _check_rows, results, wanted),
        *_guarded("memory", _memory_rows, results, wanted),
        *_guarded("bytes read by a rank at TP 2 / whole pair", _rank_rows, results, wanted),
        *_guarded("two checkpoints to first answer", _route_rows, results, wanted),
        *_guarded("serving throughput / plain", _serving_rows, results, wanted),
        *_guarded("growth", _growth_rows, results, wanted),
        *_guarded("start, expo-serve less plain vLLM", _phase_rows, results, wanted),
        *_guarded("help and mistakes, seconds", _answer_rows, results, wanted),
    ]


def _guarded(name: str, make: Callable[[_Results, str], list[Row]], results: _Results, wanted: str) -> list[Row]:
    """A script that has not run leaves an empty file, or none."""
    with suppress(KeyError, ValueError):
        return make(results, wanted)
    return [(name, "not measured", "", "")]


def _verdict(value: float, bar: float, ambition: float | None = None) -> str:
    if ambition is not None and value <= ambition:
        return "ambition met"
    return "met" if value <= bar else "**not met**"


def _barred(name: str, figures: dict[str, Any], bar: float, ambition: float | None = None, digits: int = 2) -> Row:
    aim = f"at most {bar:g}" + (f", ambition {ambition:g}" if ambition is not None else "")
    return name, shown(figures, digits), aim, _verdict(figures["median"], bar, ambition)


def _load_rows(results: _Results, wanted: str) -> list[Row]:
    size = main_size(results["load_time"], wanted)
    own = results["load_time"][size]
    found = [
        _barred(
            f"load of the pair, warm, {size} / plain vLLM with one torch thread",
            own["warm"]["expo_to"]["plain"],
            1.3,
            1,
        ),
        _barred("the same / plain vLLM with two torch threads", own["warm"]["expo_to"]["plain2"], 1.75, 1.5),
    ]
    if "cold" in own:
        found.append(_barred(f"cold, {size}: pair / plain", own["cold"]["expo_to"]["plain"], 2.1, 2))
    for state in ("warm", "cold"):
        peer = own.get(state, {}).get("expo_to", {}).get("runai")
        reason = own["skipped"].get("runai", "not measured")
        found.append(
            (f"{state}, {size}: pair / runai_streamer, one side", shown(peer) if peer else reason, "", "reported")
        )
    return found


# Against plain vLLM's load of the aligned checkpoint: bar and ambition.
_DELTA_BARS = {"packed": (2.0, 1.2), "lora16": (2.2, 1.2), "lora8": (1.7, 1.2)}
_DELTA_NAMES = {"lora16": "LoRA of rank 16", "lora8": "LoRA of rank 8", "packed": "packed", "full": "full"}
_DELTA_NAMES["dense"] = "packed, four fifths of the values changed"
_COLD_BAR = 1.15


def _delta_rows(results: _Results, wanted: str) -> list[Row]:
    size = main_size(results["delta_load"], wanted)
    own = results["delta_load"][size]
    found: list[Row] = []
    for kind, name in _DELTA_NAMES.items():
        share = own["delta_bytes"][kind] / own["side_bytes"]
        label = f"base plus delta, {size}, {name} ({share:.1%} of the checkpoint)"
        ratio = own["warm"]["to_plain"][kind]
        barred = _DELTA_BARS.get(kind)
        row = _barred(f"{label}, warm / plain", ratio, *barred) if barred else None
        found.append(row or (f"{label}, warm / plain", shown(ratio), "", "reported"))
        if "cold" in own:
            state = f"cold, disk at 1 GB/s{'' if own['cold']['throttled'] else ' (not throttled)'}"
            ratio = own["cold"]["to_plain"][kind]
            row = _barred(f"the same, {state} / plain", ratio, _COLD_BAR) if kind == "packed" else None
            found.append(row or (f"the same, {state} / plain", shown(ratio), "", "reported"))
    above = {kind: own["warm"]["anonymous_above_plain"][kind] for kind in _DELTA_BARS}
    most = max(above, key=lambda kind: above[kind]["median"])
    verdict = _verdict(above[most]["median"], 64 * _MIB)
    found.append(
        (f"anonymous memory above plain, MiB, {size}, {most}", shown(above[most], 1, _MIB), "at most 64", verdict)
    )
    if "bytes" in own["zipnn"]:
        figure = (
            f"{own['zipnn']['bytes'] / own['side_bytes']:.1%}; {shown(own['zipnn']['decompress_seconds'])} s to memory"
        )
        found.append((f"ZipNN, the whole checkpoint, {size}", figure, "", "reported"))
    return found


def _check_rows(results: _Results, wanted: str) -> list[Row]:
    ratios = results["check_cost"][wanted]["checked_over_unchecked"]
    name = f"looking at every value for NaN and Inf, warm, {wanted}: with / without"
    return [
        (f"{name}, {way}", shown(ratios[key]), "", "reported")
        for key, way in (("compiled", "the compiled loop for bf16"), ("torch", "the way through torch"))
    ]


def _memory_rows(results: _Results, wanted: str) -> list[Row]:
    size = main_size(results["fresh_load"], wanted)
    own = results["fresh_load"][size]
    above = own["expo_kept_above_plain_bytes"]
    figure = shown(above, 1, _MIB)
    verdict = _verdict(above["median"], 64 * _MIB, 32 * _MIB)
    found = [
        (f"anonymous memory above plain, MiB, {size}, fresh process", figure, "at most 64, ambition 32", verdict),
        _barred("peak resident / plain, fresh process", own["expo_peak_to_plain"], 1.05, 1, 3),
        *(
            (f"load in a fresh process / plain, {name}", shown(ratio), "", "reported")
            for name, ratio in own["to_plain"].items()
        ),
    ]
    refused = own["does_not_work_on_cpu"].items()
    return [
        *found,
        *((f"peer {name}", f"does not work on CPU: `{why}`", "", "reported") for name, why in refused if why),
    ]


def _rank_rows(results: _Results, wanted: str) -> list[Row]:
    own = results["ranks"][main_size(_sized(results["ranks"], "pair_bytes"), wanted)]
    report, counted = own["report_share"], own["rchar_share"]
    by_kernel = "the same by the kernel's count of read calls"
    if counted["median"] < report["median"] / 2:
        last: Row = (by_kernel, shown(counted, 3), "", "reads went through mappings, which do not count")
    else:
        last = _barred(by_kernel, counted, 0.55, 0.51, 3)
    return [_barred("bytes read by a rank at TP 2 / whole pair, by the report", report, 0.55, 0.51, 3), last]


def _sized(results: dict[str, Any], key: str) -> dict[str, Any]:
    return {size: {**own, "side_bytes": own[key]} for size, own in results.items()}


def _route_rows(results: _Results, wanted: str) -> list[Row]:
    size = main_size(results["routes"], wanted)
    own = results["routes"][size]
    found: list[Row] = []
    for name, ratio in own["total_to_expo"].items():
        start = shown(own["routes"]["expo"]["total_seconds"], 1)
        found.append(
            (f"two checkpoints to first answer, {size}, {name} / ours ({start} s)", shown(ratio), "", "reported")
        )
    for name, many in own["alphas"].items():
        for count, seconds in many["merge_seconds"].items():
            disk = many["written_bytes"][count] / 1e9
            figure = f"{seconds:.0f} s of merging, {disk:.2f} GB of disk"
            found.append((f"{count} alpha(s), {size}, {name}; ours: 0 s, 0 GB", figure, "", "reported"))
    ratio = own["weights_phase_to_expo"]
    least = ratio["mergekit"]["median"]
    verdict = "met" if least >= 20 else "**not met**"
    found.append(
        (f"weights phase, {size}: merge + load by mergekit / ours", shown(ratio["mergekit"], 1), "at least 20", verdict)
    )
    found.append(
        (f"weights phase, {size}: merge + load by the authors' way / ours", shown(ratio["authors"], 1), "", "reported")
    )
    return found


def _serving_rows(results: _Results, wanted: str) -> list[Row]:
    size = main_size(_sized(results["serving"], "prompts"), "demo")
    ratios = results["serving"][size]["expo_to_plain"]
    found: list[Row] = []
    for key, name in (("total_token_throughput", "throughput"), ("median_ttft_ms", "TTFT"), ("median_tpot_ms", "TPOT")):
        own = ratios[key]
        low, high = own["interval"] or (0.0, float("inf"))
        figure = f"mean {own['mean']:.3f}, 95% interval {low:.3f} to {high:.3f}, {len(own['all'])} pairs of runs"
        verdict = "met" if low <= 1 <= high and high - low <= 0.06 else "**not met**"
        barred = key == "total_token_throughput"
        aim = "interval contains 1, no wider than 0.06" if barred else ""
        found.append((f"serving {name} / plain, {size}", figure, aim, verdict if barred else "reported"))
    return found


def _growth_rows(results: _Results, wanted: str) -> list[Row]:
    figures = growth(results["load_time"])
    sizes = ", ".join(figures["gigabytes"])
    found: list[Row] = []
    for name in ("expo", "plain"):
        for slope, excess in (("", "excess"), ("marginal_", "marginal_excess")):
            own = figures[name]
            if own[excess] is None:
                raise KeyError("too few sizes to say anything about growth")
            each = ", ".join(f"{value:.3f}" for value in own[f"{slope}seconds_per_gigabyte"].values())
            barred = name == "expo" and not slope
            found.append(
                (
                    f"growth of {name}, {slope.replace('_', ' ')}seconds a GB, {sizes}",
                    f"{100 * own[excess]:.0f}% from least to most: {each}",
                    "within 15%" if barred else "",
                    _verdict(own[excess], 0.15) if barred else "reported",
                )
            )
    return found


def _phase_rows(results: _Results, wanted: str) -> list[Row]:
    size = main_size(results["phases"], wanted)
    both = results["phases"][size]["phases"]
    expo, plain = (shown(both[name]["all"], 1) for name in ("expo", "plain"))
    differences = {
        key: own["median"] - both["plain"][key]["median"] for key, own in both["expo"].items() if key in both["plain"]
    }
    most = max((key for key in differences if key not in ("all", "weights, as said")), key=lambda key: differences[key])
    figure = f"{expo} s against {plain} s; the largest difference is {differences[most]:+.2f} s, {most}"
    return [
        (f"start to first answer, {size}, expo-serve and plain vLLM on the merged checkpoint", figure, "", "reported")
    ]


def _answer_rows(results: _Results, wanted: str) -> list[Row]:
    seconds = results["answers"]["demo"]["seconds"]
    slowest = max(seconds, key=lambda name: seconds[name]["median"])
    return [_barred(f"seconds to an answer without a load, the slowest: {slowest}", seconds[slowest], 0.5)]


def summary(folder: Path, wanted: str) -> str:
    """The table, and where its figures come from."""
    results = {name: read(name, folder) for name in SCRIPTS}
    machines = [own["machine"] for sizes in results.values() for own in sizes.values()]
    if not machines:
        return "Nothing was measured yet."
    commits = sorted(
        {f"{machine['commit'][:12]}{' with changes' * machine['uncommitted_changes']}" for machine in machines}
    )
    machine = machines[0]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return "\n".join(
        [
            "# Figures against their bars",
            "",
            "Median (min to max) of ratios taken round by round, A and B in turn. Written by `make bench`.",
            "",
            f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['torch_cpu_capability']}, "
            f"{machine['memory_bytes'] / 1e9:.0f} GB. Versions: {versions}. Commit: {', '.join(commits)}.",
            "",
            table(("figure", "measured", "bar", ""), rows(results, wanted)),
            "",
            *_disturbed(results["load_time"]),
        ]
    )


def _disturbed(load_time: dict[str, Any]) -> list[str]:
    """A warning for every measurement during which the machine was not left alone."""
    return [
        f"**Not alone:** while loads of {size} were measured ({state}), other processes kept {cores:.2f} cores busy.\n"
        for size, own in load_time.items()
        for state in ("warm", "cold")
        if (cores := own.get(state, {}).get("others_cores", 0.0)) > _QUIET_CORES
    ]


def write(folder: Path, wanted: str) -> str:
    """Make the table and write it beside the result files."""
    text = summary(folder, wanted)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.md").write_text(text)
    return text


def main() -> None:
    """Print the table and write it."""
    options = parser(__doc__, size=MAIN_SIZE, rounds=0).parse_args()
    print(write(options.results, options.size))


if __name__ == "__main__":
    main()
