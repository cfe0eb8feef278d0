"""Figures on the pages are those of the result files of the load tests."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from loadtests import rounding_table, sweep
from tests.docs.pages import README, ROOT, page, rows

PERFORMANCE = page("performance.md")


@cache
def result(name: str) -> Any:
    """A result file."""
    return json.loads((ROOT / "loadtests/results" / f"{name}.json").read_text())


def spread(figures: dict[str, float], digits: int = 2, unit: float = 1) -> list[str]:
    """Median, smallest and largest, as the pages write them."""
    return [f"{figures[key] / unit:.{digits}f}" for key in ("median", "min", "max")]


def delta(state: str, kind: str, size: str = "1.1b") -> list[str]:
    """A load of base and a delta, relative to plain."""
    return spread(result("delta_load")[size][state]["to_plain"][kind])


def loading() -> dict[str, list[str]]:
    """The rows of the table of loads."""
    load, fresh = result("load_time")["1.1b"], result("fresh_load")["1.1b"]
    return {
        "pair, warm": spread(load["warm"]["expo_to"]["plain"]),
        "pair, warm, plain with two torch threads": spread(load["warm"]["expo_to"]["plain2"]),
        "pair, fresh process": spread(fresh["to_plain"]["expo"]),
        "packed delta, fresh process": spread(fresh["to_plain"]["packed"]),
        "LoRA rank 16, fresh process": spread(fresh["to_plain"]["lora16"]),
        "full delta, fresh process": spread(fresh["to_plain"]["full"]),
        "pair, cold": spread(load["cold"]["expo_to"]["plain"]),
        "packed delta (6.7% of the bytes), warm": delta("warm", "packed"),
        "packed delta, cold, disk at 1 GB/s": delta("cold", "packed"),
        "packed delta, four fifths changed (32.5%), warm": delta("warm", "dense"),
        "packed delta, four fifths changed, cold, disk at 1 GB/s": delta("cold", "dense"),
        "LoRA rank 16 (1.1%), warm": delta("warm", "lora16"),
        "LoRA rank 16, cold, disk at 1 GB/s": delta("cold", "lora16"),
        "LoRA rank 8 (0.5%), warm": delta("warm", "lora8"),
        "LoRA rank 8, cold, disk at 1 GB/s": delta("cold", "lora8"),
        "full delta in bf16 (100%), warm": delta("warm", "full"),
        "full delta, cold, disk at 1 GB/s": delta("cold", "full"),
    }


def memory() -> dict[str, list[str]]:
    """The rows of the table of memory."""
    fresh, rank = result("fresh_load")["1.1b"], result("ranks")["1.1b"]
    above = result("delta_load")["1.1b"]["warm"]["anonymous_above_plain"]["packed"]
    return {
        "anonymous memory above the weights, pair, fresh process, MiB": spread(
            fresh["expo_kept_above_plain_bytes"], 1, 2**20
        ),
        "anonymous memory above plain, packed delta, MiB": spread(above, 1, 2**20),
        "peak resident size, relative to plain, which maps its file": spread(fresh["expo_peak_to_plain"], 3),
        "bytes read by one of two tensor-parallel ranks, of the pair": spread(rank["report_share"], 3),
    }


def routes() -> dict[str, list[str]]:
    """The rows of both tables of routes."""
    found = result("routes")["1.1b"]
    merging = {
        name: [f"{way['merge_seconds']['8']:.0f}", f"{way['written_bytes']['8'] / 1e9:.2f}"]
        for name, way in found["alphas"].items()
    }
    return {
        "mergekit, then vLLM": spread(found["total_to_expo"]["mergekit"]),
        "the ExPO authors' script, then vLLM": spread(found["total_to_expo"]["authors"]),
        "expo-serve": ["0", "0"],
        "mergekit": merging["mergekit"],
        "the ExPO authors' script": merging["authors"],
    }


def serving() -> dict[str, list[str]]:
    """The rows of the table of serving."""
    ratios = result("serving")["demo"]["expo_to_plain"]
    names = {
        "throughput": "total_token_throughput",
        "time to first token": "median_ttft_ms",
        "time per output token": "median_tpot_ms",
    }
    return {
        name: [f"{value:.3f}" for value in (ratios[key]["mean"], *ratios[key]["interval"])]
        for name, key in names.items()
    }


def table(heading: str) -> dict[str, list[str]]:
    """All tables below a heading of the page."""
    return {name: values for name, *values in rows(PERFORMANCE.section(heading))}


def test_loads() -> None:
    demo = {
        "pair": delta("warm", "pair", "demo"),
        "packed delta (3.0%)": delta("warm", "packed", "demo"),
        "LoRA rank 16": delta("warm", "lora16", "demo"),
    }
    assert table("Loading") == {**loading(), **demo}


def test_sizes_of_deltas() -> None:
    for size, shares in (("1.1b", {"packed": "6.7%", "lora16": "1.1%", "lora8": "0.5%", "dense": "32.5%"}),):
        found = result("delta_load")[size]
        for kind, share in shares.items():
            assert f"{found['delta_bytes'][kind] / found['side_bytes']:.1%}" == share
    demo = result("delta_load")["demo"]
    assert f"{demo['delta_bytes']['packed'] / demo['side_bytes']:.1%}" == "3.0%"


def test_memory() -> None:
    assert table("Memory") == memory()


def test_routes() -> None:
    assert table("Routes to the first answer") == routes()


def test_serving() -> None:
    assert table("Serving") == serving()


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        ("Three runs of the first row, two of them within an hour, gave {}, {} and {}", "1.12 1.55 0.99"),
        ("The interval of throughput is {} wide; the bar was 0.06", "0.061"),
        ("as long as expo-serve's ({} to {}); the bar was 20", "8.1 18.1"),
        ("They fall from {} to {}", "0.442 0.152"),
        ("expo-serve took {} s ({}\nto {}) and plain vLLM {} s", "25.2 24.5 25.8 24.3"),
    ],
)
def test_figures_within_sentences(text: str, figures: str) -> None:
    assert text.format(*figures.split()) in PERFORMANCE.text
    assert figures.split() == sentence_figures()[text]


def sentence_figures() -> dict[str, list[str]]:
    """What the result files say for each sentence."""
    other = result("load_time_another_run")
    runs = [other["1.1b at 0d43b2f"], other["1.1b at 65610cd"], result("load_time")["1.1b"]]
    low, high = result("serving")["demo"]["expo_to_plain"]["total_token_throughput"]["interval"]
    weights = result("routes")["1.1b"]["weights_phase_to_expo"]["mergekit"]
    load = result("load_time")
    rates = [
        load[size]["warm"]["seconds"]["expo"]["median"] / (load[size]["side_bytes"] / 1e9) for size in ("demo", "3b")
    ]
    phases = result("phases")["demo"]["phases"]
    return {
        "Three runs of the first row, two of them within an hour, gave {}, {} and {}": [
            f"{run['warm']['expo_to']['plain']['median']:.2f}" for run in runs
        ],
        "The interval of throughput is {} wide; the bar was 0.06": [f"{high - low:.3f}"],
        "as long as expo-serve's ({} to {}); the bar was 20": [f"{weights[key]:.1f}" for key in ("min", "max")],
        "They fall from {} to {}": [f"{rate:.3f}" for rate in rates],
        "expo-serve took {} s ({}\nto {}) and plain vLLM {} s": [
            *(f"{phases['expo']['all'][key]:.1f}" for key in ("median", "min", "max")),
            f"{phases['plain']['all']['median']:.1f}",
        ],
    }


def test_figures_of_the_readme() -> None:
    loads = loading()
    shown = {
        "load of a pair, files in the page cache": loads["pair, warm"][0],
        "load of a pair, cold files": loads["pair, cold"][0],
        "load of base and a packed delta, files in the page cache": delta("warm", "packed")[0],
        "load of base and a packed delta, cold files on a disk of 1 GB/s": delta("cold", "packed")[0],
        "serving throughput": f"{float(serving()['throughput'][0]):.2f}",
        f"disk for eight alphas, GB (mergekit: {routes()['mergekit'][1]})": routes()["expo-serve"][1],
    }
    assert dict(rows(README.section("What it costs"))) == shown
    for figure in (loads["pair, warm, plain with two torch threads"][0], *serving()["throughput"][1:]):
        assert figure in README.section("What it costs")


def test_rounding() -> None:
    ratios = result("rounding_cost")["1.1b"]["ratios"]
    assert table("Rounding") == {
        "load, dithered / nearest": spread(ratios["dithered / nearest"]),
        "dithered, with effective alpha / without": spread(ratios["dithered / unmeasured"]),
        "`inspect --measure` / load, dithered": spread(ratios["measure / dithered"]),
    }


def test_sweep_of_the_demo() -> None:
    text = page("choosing-alpha.md").text
    figures = text.partition("<!-- figures -->")[2].partition("<!-- end of figures -->")[0]
    assert figures.strip() == sweep.page_table(result("sweep")["demo"])
    assert set(result("sweep")["demo"]["greedy"]["answers_that_differ_from_a_server"].values()) == {0}


def test_what_alpha_does() -> None:
    assert rounding_table.page(rounding_table.PAGE.read_text(), rounding_table.written()) == (
        rounding_table.PAGE.read_text()
    ), "run python -m loadtests.rounding_table"
