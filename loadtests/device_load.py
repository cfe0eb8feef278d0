"""How fast does a pair come onto a GPU, against what its link can do? Needs torch with CUDA, not vLLM.

Rates in GB of both sides a second: expo's way (positioned reads into two turns of pinned buffers, copies on a stream
of their own, lerp on the device), for several sizes and numbers of buffers; the link's own rate from pinned memory;
``safetensors.torch.load_file`` onto the device, and fastsafetensors where it is installed, both of one side, which is
all that they can do. Also: the device memory above the parameters, whether the bits are the same for all buffers, and
the share of values whose last place differs from the CPU's.

    python -m loadtests.device_load [--gigabytes 4] [--rounds 5] [--device cuda]

With ``--device cpu`` the script runs anywhere, by the loader's way for the CPU: a check of the script, not a figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from expo_serve.config import ExpoConfig
from expo_serve.load.counts import Counts
from expo_serve.load.device import CudaQueue, Stage, Stages
from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.reader import Reader
from expo_serve.load.session import LoadSession
from expo_serve.load.sizes import STAGE_BYTES
from expo_serve.load.sizes import STAGE_TURNS as TURNS
from expo_serve.load.threads import Background
from expo_serve.plan.plan import Plan
from expo_serve.plan.prepare import prepare
from loadtests.machine import describe

ALPHA = 0.5
BUFFERS = [(1 << 20, 2), (4 << 20, 2), (STAGE_BYTES, TURNS), (32 << 20, 2), (STAGE_BYTES, 4)]
"""Bytes of each side in a turn, and turns; the loader's own choice is among them."""
_ROWS, _COLUMNS = 4096, 4096


class ChosenStages(Stages):
    """As the loader's, with buffers of a chosen size and number."""

    def __init__(self, stage_bytes: int, turns: int) -> None:
        super().__init__()
        self._chosen = stage_bytes, turns

    def _new(self, device: torch.device) -> Stage:
        return Stage(CudaQueue(device), *self._chosen)


def write_pair(folder: Path, size: int) -> Plan:
    """A random bf16 pair of about ``size`` bytes a side, and its plan."""
    generator = torch.Generator().manual_seed(0)
    number = max(1, size // (_ROWS * _COLUMNS * 2))
    base = {f"layers.{i}.weight": torch.randn(_ROWS, _COLUMNS, generator=generator).bfloat16() for i in range(number)}
    step = torch.randn(_ROWS, _COLUMNS, generator=generator) * 0.01
    aligned = {name: (tensor.float() + step).bfloat16() for name, tensor in base.items()}
    for side, tensors in (("base", base), ("aligned", aligned)):
        (folder / side).mkdir()
        (folder / side / "config.json").write_text(json.dumps({"model_type": "x", "architectures": ["X"]}))
        save_file(tensors, folder / side / "model.safetensors")
    return prepare(ExpoConfig(base=str(folder / "base"), aligned=str(folder / "aligned"), alpha=ALPHA))


def load_pair(plan: Plan, parameters: dict[str, torch.Tensor], stage_bytes: int, turns: int) -> None:
    """What the loader does for each tensor, without a model around it."""
    model = torch.nn.Module()
    for name, values in parameters.items():
        model.register_parameter(name.replace(".", "-"), torch.nn.Parameter(values, requires_grad=False))
    reader, counts = Reader(), Counts()
    with Background(model) as background, ChosenStages(stage_bytes, turns) as stages:
        for name, planned in plan.tensors.items():
            parameters[name].copy_(lazy_tensor(planned, LoadSession(reader, counts, background.submit, stages)))
        background.wait()
        stages.wait()


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long it takes until the device has done it."""
    _finish(device)
    started = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def link_copy(device: torch.device, size: int) -> Callable[[], object]:
    """A copy of pinned memory onto the device in pieces of 32 MB, as fast as the link allows."""
    piece = 32 << 20
    host = torch.empty(piece, dtype=torch.uint8, pin_memory=device.type == "cuda").fill_(1)
    there = torch.empty(piece, dtype=torch.uint8, device=device)

    def copy() -> None:
        for _ in range(size // piece):
            there.copy_(host, non_blocking=True)

    return copy


def fastsafetensors_load(file: Path, device: torch.device) -> Callable[[], object] | None:
    """One side by fastsafetensors; None where it is not installed."""
    try:
        from fastsafetensors import fastsafe_open
    except ImportError:
        return None

    def load() -> None:
        with fastsafe_open([str(file)], nogds=True, device=str(device)) as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                opened.get_tensor(name)

    return load


def ways(plan: Plan, parameters: dict[str, torch.Tensor], device: torch.device) -> Iterator[tuple[str, Any, int]]:
    """What is compared: a name, what it does, and how many bytes it brings."""
    pair_bytes = plan.base.nbytes + plan.aligned_or_delta.nbytes
    yield "link", link_copy(device, pair_bytes), pair_bytes
    for stage_bytes, turns in BUFFERS if device.type == "cuda" else BUFFERS[:1]:
        name = f"expo {stage_bytes >> 20} MB x {turns}"
        yield name, lambda s=stage_bytes, t=turns: load_pair(plan, parameters, s, t), pair_bytes
    file = plan.aligned_or_delta.files[0]
    yield "safetensors, one side", lambda: load_file(file, device=str(device)), plan.aligned_or_delta.nbytes
    if fast := fastsafetensors_load(file, device):
        yield "fastsafetensors, one side", fast, plan.aligned_or_delta.nbytes


def measure(plan: Plan, device: torch.device, rounds: int) -> dict[str, Any]:
    """All ways in turn; the first round warms up and is not counted."""
    shapes = {name: planned.aligned.shape for name, planned in plan.tensors.items()}
    parameters = {name: torch.zeros(shape, dtype=torch.bfloat16, device=device) for name, shape in shapes.items()}
    rates: dict[str, list[float]] = {}
    digests, above = {}, {}
    for index in range(rounds + 1):
        for name, work, size in ways(plan, parameters, device):
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds = seconds_of(work, device)
            if index:
                rates.setdefault(name, []).append(size / seconds / 1e9)
            if name.startswith("expo"):
                digests[name] = [int(values.view(torch.int16).long().sum()) for values in parameters.values()]
                above[name] = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    link = statistics.median(rates["link"])
    return {
        "gigabytes_per_second": {name: _spread(found) for name, found in rates.items()},
        "share_of_link": {name: statistics.median(found) / link for name, found in rates.items()},
        "device_bytes_above_parameters": above,
        "same_bits_for_all_buffers": len({str(digest) for digest in digests.values()}) == 1,
        "share_that_differs_from_cpu": _difference(plan, parameters),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _difference(plan: Plan, parameters: dict[str, torch.Tensor]) -> float:
    """The share of values that the CPU rounds to another neighbour; more than one step apart is an error."""
    differing = total = 0
    for name, planned in plan.tensors.items():
        expected = lazy_tensor(planned, LoadSession(Reader(), Counts())).materialize()
        steps = (parameters[name].cpu().view(torch.int16).int() - expected.view(torch.int16).int()).abs()
        assert int(steps.max()) <= 1, name
        differing += int(steps.count_nonzero())
        total += steps.numel()
    return differing / total


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of one side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results/device_load.json"))
    options = parser.parse_args()
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device(options.device)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expo-device-load-")))
        figures = measure(write_pair(folder, int(options.gigabytes * 1e9)), device, options.rounds)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result = {"machine": {**describe(), "device": name}, "gigabytes_a_side": options.gigabytes, **figures}
    if device.type == "cuda":
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
