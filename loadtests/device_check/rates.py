"""How fast do weights come onto the device, against what its link can do?

A rate is in bytes that the load reads of all its sources in a second; the ways of a case run in turn in one process.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expo_serve.plan.plan import Plan
from loadtests import page_cache
from loadtests.device_check import files, stage
from loadtests.device_check.setting import Setting
from loadtests.results import spread, turns

RANKS, RANK = 8, 3
_ROWS, _COLUMNS = 8192, 4096
_SMALL = (96, 2048)
"""A third of a megabyte: what one of eight ranks takes of a small expert."""
_LORA_RANK = 16
_LINK_PIECE = 32 << 20
_CHANGED = 15
"""Of so many values of the aligned side one is another than base's."""
THREADS = (2, 4, 8, 16)
PIECE_BYTES = (4 << 20, 8 << 20, 16 << 20, 32 << 20)


@dataclass(frozen=True)
class Way:
    """One of the ways that are compared."""

    work: Callable[[], object]
    nbytes: int
    """That it brings onto the device, or reads."""
    before: Callable[[], object] = lambda: None
    """Done before each run, not measured."""


def run(setting: Setting, what: str) -> dict[str, Any]:
    """Measure one group of ways."""
    groups: dict[str, Callable[[Setting], dict[str, Any]]] = {
        "contiguous": lambda here: _of_pair(here, {"contiguous": lambda tensor: tensor}),
        "row": lambda here: _of_pair(here, {"row of 8 ranks": _row, "transposed": lambda tensor: tensor.t()}),
        "small": _small,
        "lora": _lora,
        "packed": _packed,
        "cold": _cold,
        "threads": _threads,
        "pieces": _pieces,
    }
    return groups[what](setting)


def measured(setting: Setting, ways: dict[str, Way]) -> dict[str, Any]:
    """All ways in turn, with the link among them; the first round warms up and does not count."""
    biggest = max(way.nbytes for way in ways.values())
    ways = {"link": Way(link_copy(setting, biggest), biggest), **ways}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, dict[str, int] | None] = {}
    for index, name in enumerate(turns(list(ways), setting.rounds + 1)):
        way = ways[name]
        way.before()
        memory = setting.memory()
        seconds = setting.seconds(way.work)
        peaks[name] = memory.peaks()
        if index >= len(ways):
            rates[name].append(way.nbytes / seconds / 1e9)
    link = statistics.median(rates["link"])
    return {
        "link_is": "pinned memory, 32 MB at a time" if setting.is_cuda else "a copy in memory: no link on a CPU",
        "gigabytes_per_second": {name: spread(found) for name, found in rates.items()},
        "share_of_link": {name: round(statistics.median(found) / link, 4) for name, found in rates.items()},
        "peak_bytes_above_parameters": peaks,
        "bytes": {name: way.nbytes for name, way in ways.items()},
    }


def link_copy(setting: Setting, size: int) -> Callable[[], object]:
    """A copy of pinned memory onto the device, as fast as the link allows."""
    piece = min(size, _LINK_PIECE)
    host = torch.empty(piece, dtype=torch.uint8, pin_memory=setting.is_cuda).fill_(1)
    there = torch.empty(piece, dtype=torch.uint8, device=setting.device)

    def bring() -> None:
        for _ in range(max(1, size // piece)):
            there.copy_(host, non_blocking=True)

    return bring


class Load:
    """A load of all tensors of a plan, or of one part of each, into parameters that are there already."""

    def __init__(self, setting: Setting, plan: Plan, take: Callable[[Any], Any] = lambda tensor: tensor) -> None:
        self._setting, self._plan, self._take, self._choice = setting, plan, take, stage.USUAL
        self.parameters = self._allocated()
        self.nbytes = 0

    def cut(self, **numbers: int) -> Load:
        """The same load into the same parameters, with a stage that is cut so."""
        other = copy(self)
        other._choice = stage.Choice(**numbers)
        return other

    def __call__(self) -> None:
        """Load once."""
        with stage.session_into(self.parameters, self._choice) as session:
            for name, lazy in stage.walk(self._plan, self.parameters, session):
                self.parameters[name].copy_(self._take(lazy))
        self.nbytes = sum(session.counts.read_bytes.values())

    def way(self, before: Callable[[], object] = lambda: None) -> Way:
        """This load as a way: its bytes are those that a first run, which also proves it whole, has read."""
        for values in self.parameters.values():
            values.fill_(torch.nan)
        self()
        self._setting.synchronize()
        holes = [name for name, values in self.parameters.items() if bool(values.isnan().any())]
        if holes:
            raise ValueError(f"{len(holes)} of {len(self.parameters)} tensors have values that were not written")
        return Way(self, self.nbytes, before)

    def _allocated(self) -> dict[str, torch.Tensor]:
        whole = {
            name: self._take(torch.empty(planned.result.shape, dtype=torch.bfloat16, device="meta"))
            for name, planned in self._plan.tensors.items()
        }
        return {
            name: torch.empty(view.shape, dtype=view.dtype, device=self._setting.device) for name, view in whole.items()
        }


def _of_pair(setting: Setting, takes: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    plan = pair_plan(setting)
    return measured(setting, {name: Load(setting, plan, take).way() for name, take in takes.items()})


def _row(tensor: Any) -> Any:
    return tensor.chunk(RANKS, 1)[RANK]


def _small(setting: Setting) -> dict[str, Any]:
    number = 40 if setting.quick else 4000
    folder = files.made_once(
        setting.work / f"rates-small-{number}",
        lambda to: _write_pair(to, {f"model.layers.0.mlp.experts.{i}.up_proj.weight": _SMALL for i in range(number)}),
    )
    load = Load(setting, files.plan(folder / "base", folder / "aligned"))
    figures = measured(setting, {"small": load.way()})
    seconds = load.nbytes / statistics.median(figures["gigabytes_per_second"]["small"]["all"]) / 1e9
    return {**figures, "tensors": number, "microseconds_a_tensor": round(1e6 * seconds / number, 1)}


def _lora(setting: Setting) -> dict[str, Any]:
    folder = pair(setting)
    adapter = files.made_once(folder.with_name(f"{folder.name}-lora"), lambda to: _write_lora(to, folder))
    plan = files.plan(folder / "base", adapter / "delta")
    ways = {"lora": Load(setting, plan).way(), "lora, row of 8 ranks": Load(setting, plan, _row).way()}
    with stage.counted_ways() as counted:
        figures = measured(setting, ways)
    return {**figures, "rank": _LORA_RANK, "pieces_by_way": dict(counted)}


def _packed(setting: Setting) -> dict[str, Any]:
    folder = pair(setting)
    made = files.made_once(
        folder.with_name(f"{folder.name}-packed"),
        lambda to: files.write_packed(folder / "base", folder / "aligned", to / "delta"),
    )
    plan = files.plan(folder / "base", made / "delta")
    ways = {"packed": Load(setting, plan).way(), "packed, row of 8 ranks": Load(setting, plan, _row).way()}
    return {**measured(setting, ways), "share_changed": round(1 / _CHANGED, 3)}


def _cold(setting: Setting) -> dict[str, Any]:
    folder = pair(setting)
    weights = list(_files(folder))
    shares: list[float] = []

    def drop() -> None:
        page_cache.drop(weights)
        shares.append(round(page_cache.resident_share(weights), 3))

    size = sum(file.stat().st_size for file in weights)
    ways = {
        "cold": Load(setting, pair_plan(setting)).way(drop),
        "plain read, cold": Way(lambda: page_cache.read_all(weights), size, drop),
    }
    return {**measured(setting, ways), "share_still_cached": {"largest": max(shares), "all": shares}}


def _threads(setting: Setting) -> dict[str, Any]:
    load = Load(setting, pair_plan(setting))
    numbers = THREADS[:2] if setting.quick else THREADS
    ways = {f"{number} threads": load.cut(threads=number).way() for number in numbers}
    return {**measured(setting, ways), "cores": len(os.sched_getaffinity(0))}


def _pieces(setting: Setting) -> dict[str, Any]:
    setting.need_cuda("pieces of the stage")
    load, usual = Load(setting, pair_plan(setting)), stage.USUAL.described()
    ways = {
        f"{size >> 20} MB x {number}": load.cut(piece_bytes=size, turns=number).way()
        for size in PIECE_BYTES
        for number in sorted({usual["turns"], 2, 6})
    }
    return measured(setting, ways)


def pair(setting: Setting) -> Path:
    """The pair of some gigabytes, in the page cache: just written, or read by the run that proves a load whole."""
    number = 2 if setting.quick else 32
    rows, columns = (1024, 1024) if setting.quick else (_ROWS, _COLUMNS)
    shapes: dict[str, files.Shape] = {
        f"model.layers.{index}.mlp.down_proj.weight": (rows, columns) for index in range(number)
    }
    return files.made_once(setting.work / f"rates-pair-{number}", lambda to: _write_pair(to, shapes))


def pair_plan(setting: Setting) -> Plan:
    """The plan of that pair."""
    return files.plan(pair(setting) / "base", pair(setting) / "aligned")


def _write_pair(folder: Path, shapes: Mapping[str, files.Shape]) -> None:
    """All tensors of a side have the same values: writing gigabytes of fresh ones would take longer than the checks."""
    shape = next(iter(shapes.values()))
    base = files.numbers(shape, 1, 0.02).bfloat16()
    aligned = base.clone()
    aligned.view(-1)[::_CHANGED] += 0.001
    dtypes = dict.fromkeys(shapes, torch.bfloat16)
    for side, values in (("base", base), ("aligned", aligned)):
        files.write_large(folder / side, shapes, dtypes, lambda name, values=values: values)  # type: ignore[misc]


def _write_lora(folder: Path, base: Path) -> None:
    plan = files.plan(base / "base", base / "aligned")
    factors = {name: _factors(planned.result.shape) for name, planned in plan.tensors.items()}
    files.write_adapter(folder / "delta", factors)


def _factors(shape: files.Shape) -> tuple[torch.Tensor, torch.Tensor]:
    outputs, inputs = shape
    a, b = files.numbers((_LORA_RANK, inputs), 3, 0.02), files.numbers((outputs, _LORA_RANK), 4, 1e-4)
    return a.bfloat16(), b.bfloat16()


def _files(folder: Path) -> Iterator[Path]:
    """Those of both sides."""
    yield from (folder / side / "model.safetensors" for side in ("base", "aligned"))
