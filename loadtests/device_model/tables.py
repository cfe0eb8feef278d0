"""The estimates, and the check of the model against the same pipeline in real time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from loadtests.device_model.clock import Rates
from loadtests.device_model.pipeline import PACKED, PAIR, Format, Outcome, load, low_rank
from loadtests.device_model.throttled import measure
from loadtests.device_model.workloads import MODELS, Model, alike, workload
from loadtests.results import table as table_of

FORMATS: dict[str, Format] = {"pair": PAIR, "packed": PACKED, "LoRA, rank 16": low_rank(16)}
_DRAM = 350e9
"""Bytes a second of a host with two sockets; each byte that is loaded crosses it three times."""
_RANK = Rates(readers=7, reader_bytes=6e9, storage_bytes=_DRAM / 3 / 8, link_bytes=50e9, memory_bytes=3e12)
"""One of eight ranks of a host, from its page cache."""
_MACHINES: dict[str, tuple[int, Rates]] = {
    "H100 PCIe": (1, Rates(readers=8, reader_bytes=7e9, link_bytes=55e9, memory_bytes=2e12)),
    "GH200": (1, Rates(readers=8, reader_bytes=7e9, link_bytes=380e9, memory_bytes=4e12)),
    "8 ranks, page cache": (8, _RANK),
    "8 ranks, NVMe 10 GB/s": (8, replace(_RANK, storage_bytes=10e9 / 8)),
    "8 ranks, network 2 GB/s, 20 ms": (8, replace(_RANK, readers=8, storage_bytes=2e9 / 8, request_seconds=20e-3)),
}
_LARGEST_OF_ONE = "8B"
_SLOW = Rates(
    readers=3, reader_bytes=200e6, storage_bytes=500e6, link_bytes=600e6, memory_bytes=2e9, copy_seconds=1e-3,
    launch_seconds=1e-3, tensor_seconds=0.0, copy_call_seconds=0.0, call_seconds=0.0,
)  # fmt: skip
"""So slow that what Python takes is little beside it."""
_THROTTLED = {
    "8 MB tensors, reading slowest": (8 << 20, 6, 6, _SLOW),
    "8 MB tensors, the link slowest": (8 << 20, 6, 6, replace(_SLOW, readers=6, storage_bytes=2e9, link_bytes=250e6)),
    "8 MB tensors, combining slowest": (
        8 << 20,
        6,
        6,
        replace(_SLOW, readers=6, storage_bytes=2e9, memory_bytes=0.2e9),
    ),
    "0.4 MB tensors": (400_000, 60, 6, _SLOW),
}


def estimates(names: list[str]) -> dict[str, Any]:
    """Estimate the loads of some models, all by default, on every machine; print a table of each."""
    found: dict[str, Any] = {}
    for model in MODELS.values():
        if names and model.name not in names:
            continue
        rows = []
        for machine, (ranks, rates) in _MACHINES.items():
            if ranks == 1 and model.name != _LARGEST_OF_ONE:
                continue
            for name, form in FORMATS.items():
                outcome = load(workload(model, ranks), form, rates)
                found[f"{model.name}, {machine}, {name}"] = _figures(outcome)
                rows.append([machine, name, f"{outcome.seconds:.1f}", _bound(outcome)])
        print(f"\n{model.name}, {_gigabytes(model):.0f} GB in bf16\n")
        print(table_of(["machine", "difference", "seconds", "bound by"], rows), flush=True)
    return found


def check() -> dict[str, Any]:
    """Compare the model with real time, for rates that are slow enough for sleeping; print a table."""
    found: dict[str, Any] = {}
    for name, (size, count, layers, rates) in _THROTTLED.items():
        tensors = list(alike(count, size, layers))
        seconds = measure(tensors, PAIR, rates)
        expected = load(tensors, PAIR, rates).seconds
        found[name] = {"measured_seconds": seconds, "model_seconds": expected, "ratio": seconds / expected}
    rows = [[name, *(f"{value:.3f}" for value in one.values())] for name, one in found.items()]
    print(f"\n{table_of(['pipeline in real time', 'measured s', 'model s', 'ratio'], rows)}", flush=True)
    return found


def _figures(outcome: Outcome) -> dict[str, Any]:
    return {"seconds": round(outcome.seconds, 2), "busy": {part: round(s, 2) for part, s in outcome.busy.items()}}


def _bound(outcome: Outcome) -> str:
    return f"{outcome.bound} ({outcome.busy[outcome.bound] / outcome.seconds:.0%} of the time)"


def _gigabytes(model: Model) -> float:
    return sum(2 * one.taken[0].numel for one in workload(model, 1)) / 1e9
