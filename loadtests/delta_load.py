"""How long base plus a delta takes to load, against plain vLLM's load of the aligned checkpoint and against the pair.

As in `load_time`: one process, one model, in turn, parameters touched before. Warm: all files in the page cache,
which is checked. Cold: dropped before every load, and reads of the disk throttled to 1 GB/s by the kernel's block
controller where it lets us (`throttled` says so), the same for all. zipnn, where it is installed, is the aligned
checkpoint compressed whole (ZipNN, arXiv 2411.05239): its own time to decompress all tensors to memory, before any
load.

    python -m loadtests.delta_load [--size demo|1.1b] [--rounds 9] [--cold-rounds 5]
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from expo_serve.config import ExpoConfig
from expo_serve.plan.prepare import pin, prepare
from loadtests.deltas import KINDS, Deltas, deltas_of
from loadtests.loading import CONTENDERS, GPU_CONTENDERS, empty_model, load_once, weight_bytes
from loadtests.machine import OthersAtWork
from loadtests.page_cache import drop, resident_share, warm
from loadtests.pairs import weight_files
from loadtests.results import ALPHA, parser, ratio_spread, save, shown, spread, table, turns

THROTTLE = 10**9
"""Bytes a second."""
_BLKIO = Path("/sys/fs/cgroup/blkio")
_SIDES = ("plain", "plain2", "pair")
_Loads = dict[str, list[dict[str, Any]]]


class Loads:
    """Loads of one model, in any of the ways."""

    def __init__(self, deltas: Deltas, model: torch.nn.Module, config: Any) -> None:
        self._deltas, self._model, self._config = deltas, model, config
        self._sources = {kind: _sources(deltas, kind) for kind in ("pair", *self.kinds)}

    @property
    def kinds(self) -> list[str]:
        """The deltas; ``dense`` is packed too, of a pair with four fifths of its values changed."""
        return [*KINDS, "dense"]

    def once(self, name: str) -> dict[str, Any]:
        """Load in one way."""
        contender = {**CONTENDERS, **GPU_CONTENDERS}.get(name, CONTENDERS["expo"])
        return load_once(self._model, self._config, contender, self._deltas.pair, self._sources.get(name))


def files(deltas: Deltas, name: str) -> list[Path]:
    """What one way reads."""
    pair = deltas.pair
    if name in CONTENDERS:
        return weight_files(pair.aligned)
    return [*weight_files(pair.base), *weight_files(pair.aligned if name == "pair" else deltas.path(name))]


def _sources(deltas: Deltas, kind: str) -> dict[str, Any]:
    other = {"aligned": str(deltas.pair.aligned)} if kind == "pair" else {"delta": str(deltas.path(kind))}
    config = ExpoConfig.model_validate({"base": str(deltas.pair.base), "alpha": ALPHA, **other})
    return pin(config, prepare(config), None).model_dump(mode="json", exclude_defaults=True)


def measure(deltas: Deltas, rounds: int, cold_rounds: int) -> dict[str, Any]:
    """All loads of one size, warm and cold."""
    with empty_model(deltas.pair.aligned) as (model, config):
        loads = Loads(deltas, model, config)
        names = [*_SIDES, *loads.kinds]
        for name in names:  # the first time of each touches the parameters, imports and compiles
            loads.once(name)
        figures = {
            "side_bytes": deltas.pair.side_bytes,
            "weight_bytes": weight_bytes(model),
            "delta_bytes": {kind: deltas.nbytes(kind) for kind in loads.kinds},
            "warm": _warm(names, loads, deltas, rounds),
        }
        if cold_rounds:
            figures["cold"] = _cold([name for name in names if name != "plain2"], loads, deltas, cold_rounds)
    return figures


def _warm(names: list[str], loads: Loads, deltas: Deltas, rounds: int) -> dict[str, Any]:
    done: _Loads = {name: [] for name in names}
    least = 1.0
    with OthersAtWork() as others:
        for name in turns(names, rounds):
            least = min(least, warm(files(deltas, name)))
            done[name].append(loads.once(name))
    return {"least_resident_share": least, "others_cores": others.cores, **_summary(done)}


def _cold(names: list[str], loads: Loads, deltas: Deltas, rounds: int) -> dict[str, Any]:
    done: _Loads = {name: [] for name in names}
    most = 0.0
    every = sorted({file for name in names for file in files(deltas, name)})
    with throttled(every[0]) as is_throttled, OthersAtWork() as others:
        for name in turns(names, rounds):
            drop(every)
            most = max(most, resident_share(every))
            done[name].append(loads.once(name))
    return {
        "throttled": is_throttled,
        "most_resident_share": most,
        "others_cores": others.cores,
        **_summary(done),
    }


@contextmanager
def throttled(file: Path) -> Iterator[bool]:
    """This process reads the file's disk at 1 GB/s at most, where the kernel and our rights allow it."""
    group = _BLKIO / f"expo-loadtest-{os.getpid()}"
    device = os.stat(file).st_dev
    rule = f"{os.major(device)}:{os.minor(device)}"
    try:
        group.mkdir()
        (group / "blkio.throttle.read_bps_device").write_text(f"{rule} {THROTTLE}")
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        (_BLKIO / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def _summary(loads: _Loads) -> dict[str, Any]:
    seconds = {name: [load["seconds"] for load in series] for name, series in loads.items()}
    growth = {name: [load["anonymous_growth_bytes"] for load in series] for name, series in loads.items()}
    return {
        "seconds": {name: spread(series) for name, series in seconds.items()},
        "to_plain": {name: ratio_spread(seconds[name], seconds["plain"]) for name in loads if name != "plain"},
        "anonymous_above_plain": {
            name: spread([one - other for one, other in zip(growth[name], growth["plain"], strict=True)])
            for name in loads
            if name != "plain"
        },
        "loads": loads,
    }


def measure_zipnn(deltas: Deltas, folder: Path) -> dict[str, Any]:
    """The aligned checkpoint compressed whole: its size, and the time to have all tensors back in memory."""
    if find_spec("zipnn") is None:
        return {"skipped": "zipnn is not installed"}
    from zipnn import ZipNN

    coder = ZipNN(input_format="torch", bytearray_dtype="bfloat16")
    folder.mkdir(parents=True, exist_ok=True)
    packed = {
        name: torch.frombuffer(bytearray(coder.compress(tensor)), dtype=torch.uint8)
        for file in weight_files(deltas.pair.aligned)
        for name, tensor in load_file(file).items()
    }
    file = folder / "zipnn.safetensors"
    save_file(packed, file)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        for values in load_file(file).values():
            coder.decompress(values.numpy().tobytes())
        seconds.append(time.perf_counter() - started)
    size = file.stat().st_size
    file.unlink()
    return {"bytes": size, "decompress_seconds": spread(seconds)}


def show(size: str, figures: dict[str, Any]) -> str:
    """The figures of one size as a table."""
    share = {name: count / figures["side_bytes"] for name, count in figures["delta_bytes"].items()}
    rows = [
        (size, state, name, f"{share[name]:.1%}" if name in share else "", shown(series, 3),
         shown(figures[state]["to_plain"].get(name)),
         shown(figures[state]["anonymous_above_plain"].get(name), 1, 2**20))
        for state in ("warm", "cold")
        if state in figures
        for name, series in figures[state]["seconds"].items()
    ]  # fmt: skip
    head = (
        "pair",
        "page cache",
        "what loads",
        "delta, of the checkpoint",
        "seconds",
        "to plain",
        "anonymous, MiB above",
    )
    return table(head, rows)


def main() -> None:
    """Measure one size, print the figures, add them to the result file."""
    options = parser(__doc__, size="1.1b", rounds=9)
    options.add_argument("--cold-rounds", type=int, default=5, help="default 5; 0 leaves the cold loads out")
    chosen = options.parse_args()
    with deltas_of(chosen.size, chosen.work, chosen.keep) as deltas:
        figures = measure(deltas, chosen.rounds, chosen.cold_rounds)
        figures["zipnn"] = measure_zipnn(deltas, chosen.work / "zipnn")
    save("delta_load", chosen.size, figures, chosen.results)
    print(show(chosen.size, figures))
    print(f"zipnn: {figures['zipnn']}")


if __name__ == "__main__":
    main()
