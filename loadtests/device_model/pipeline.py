"""The load's own stage and forecast, driven by a workload, with virtual time for what they would wait for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from expo_serve.checkpoint.records import Operand
from expo_serve.errors import ValuesError
from expo_serve.load import sizes
from expo_serve.load.device_queue import Queue
from expo_serve.load.forecast import Copy
from expo_serve.load.operands import Memory, Recipe
from expo_serve.load.selection import FileSpan, Selection
from expo_serve.load.stage import Stage
from expo_serve.load.stages import Stages
from expo_serve.load.threads import DaemonPool
from loadtests.device_model.clock import Clock, Rates, VirtualQueue

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Format:
    """What one element of a tensor costs on its way, by the format of the difference."""

    dtypes: Mapping[Operand, torch.dtype]
    """Of what is copied to the device."""
    read_bytes: float
    """Read from storage for each element."""
    launches: int
    traffic: float
    """Bytes of the device's memory for each element."""
    host_seconds: float = 0.0
    """Of a thread, for each element, beside reading."""
    is_decoded_whole: bool = False
    """Whether a slice along rows costs what all of its rows do."""


PAIR = Format({"base": BF16, "aligned": BF16}, 4.0, launches=5, traffic=8.0)


def low_rank(rank: int) -> Format:
    """Return the format of an adapter: base is copied, and each rank is one pass over fp32 sums."""
    return Format({"base": BF16}, 2.0, launches=8 + rank, traffic=8.0 * rank + 24.0)


PACKED = Format({"base": BF16, "delta": torch.uint8}, 2.12, 12, 12.0, host_seconds=0.45e-9, is_decoded_whole=True)
"""With 5% of the values changed: 6 bytes for each of those. The seconds are those of loadtests/results/kernels.json:
checksum and decompression."""


@dataclass(frozen=True)
class Given:
    """A tensor that the model is given, and what one rank takes of it."""

    name: str
    shape: tuple[int, ...]
    taken: tuple[Selection, ...]
    """Nothing, all, or slices."""


class _Operands:
    """Operands that take time, and hold nothing."""

    grain = 1

    def __init__(self, storage: Storage, form: Format, shape: tuple[int, ...]) -> None:
        self._storage, self._form, self._shape = storage, form, shape
        self.dtypes = form.dtypes
        self.widest = max(dtype.itemsize for dtype in form.dtypes.values())

    def spans(self, selection: Selection) -> list[FileSpan]:
        """Return none: nothing is in a file."""
        return []

    def read_bytes(self, selection: Selection) -> Mapping[str, int]:
        """Return none."""
        return {}

    def read(self, selection: Selection, memory: Memory) -> dict[Operand, torch.Tensor]:
        """Take the time of reading."""
        form = self._form
        ordered, _ = selection.in_file_order()
        runs = 0 if selection.is_contiguous else ordered.numel // max(1, ordered.extent)
        count = selection.numel
        if form.is_decoded_whole and runs:
            count = selection.end - selection.offset
        self._storage.read(count * form.read_bytes, runs * len(form.dtypes), count * form.host_seconds)
        return {}

    def fill_prefix(self, dest: torch.Tensor, selection: Selection, alpha: float, dither_key: int | None) -> int:
        """Compute nothing."""
        return 0


@dataclass
class _Coming:
    """A tensor as the forecast sees it."""

    given: Given
    recipe: Recipe
    key: tuple[object, ...] = field(init=False)
    recipes: list[Recipe] = field(init=False)

    def __post_init__(self) -> None:
        self.key, self.recipes = (self.given.name, self.given.shape), [self.recipe]

    def parts(self, dest: torch.Tensor, selection: Selection) -> Iterable[tuple[torch.Tensor, Selection, Recipe]]:
        """Return the copy as it is."""
        return [(dest, selection, self.recipe)]


class TimedStage(Stage):
    """A stage whose reading and combining take virtual time; its threads' work is done at once."""

    def __init__(self, queue: VirtualQueue, form: Format, turns: int, stage_bytes: int) -> None:
        super().__init__(queue, queue.clock.rates.readers, stage_bytes, turns)
        self._readers = DaemonPool(0, "none")
        self._virtual, self._form = queue, form
        self._read_until: dict[int, float] = {}

    def _read(self, turn: Any) -> None:
        clock = self._virtual.clock
        clock.begun = max(clock.now, turn.uploaded.end if turn.uploaded else 0.0)
        clock.read_end, clock.is_reading = clock.begun, True
        super()._read(turn)
        clock.is_reading = False
        self._read_until[id(turn)] = clock.read_end

    def _combine(self, out: torch.Tensor, piece: Any) -> None:
        clock = self._virtual.clock
        clock.now = max(clock.now, self._read_until[id(piece.turn)])
        self._virtual.launches = self._form.launches
        self._virtual.traffic = piece.transfer.selection.numel * self._form.traffic
        super()._combine(out, piece)


@dataclass(frozen=True)
class Outcome:
    """How long a load takes, and what was busy for how long."""

    seconds: float
    busy: Mapping[str, float]

    @property
    def bound(self) -> str:
        """Return what was busy longest."""
        return max(self.busy, key=lambda part: self.busy[part])

    @property
    def share(self) -> float:
        """Return the share of the time in which the slowest of reading, copying and combining was busy."""
        return max(self.busy[part] for part in ("reading", "copying", "combining")) / self.seconds


class Storage(Protocol):
    """Reads that take time."""

    def read(self, size: float, runs: int, seconds: float = 0.0) -> None:
        """Take the time of so many bytes, in so many runs, and of some seconds of a thread."""


def load(
    workload: Iterable[Given],
    form: Format,
    rates: Rates,
    turns: int = sizes.STAGE_TURNS,
    stage_bytes: int = sizes.STAGE_BYTES,
) -> Outcome:
    """Let a model take its tensors, in virtual time.

    Args:
        workload: the tensors, in the order of the checkpoint.
        form: the format of the difference.
        rates: the machine.
        turns: of the ring.
        stage_bytes: of a turn.
    """
    clock = Clock(rates)
    queue = VirtualQueue(clock)
    drive(workload, form, TimedStage(queue, form, turns, stage_bytes), queue, clock, rates, clock.think)
    return Outcome(max(clock.now, clock.model_free), {**clock.busy, "reading": clock.reading_seconds})


def drive(
    workload: Iterable[Given],
    form: Format,
    stage: Stage,
    queue: Queue,
    storage: Storage,
    rates: Rates,
    think: Callable[[float], None] = lambda seconds: None,
) -> None:
    """Let a model take its tensors by way of a stage.

    Args:
        workload: the tensors.
        form: of the difference.
        stage: where they go.
        queue: its.
        storage: takes the time of reading.
        rates: the machine.
        think: takes the time of Python, given in seconds.
    """
    stages = Stages(1, queue_of=lambda _: queue)
    with stages:
        stages._stages[queue.device] = stage
        for one in _announced(workload, stages, storage, form):
            think(rates.tensor_seconds)
            for selection in one.given.taken:
                think(rates.copy_call_seconds)
                dest = torch.empty(selection.shape, dtype=BF16, device="meta")
                stage.fill(dest, selection, one.recipe)
                stages._forecast.took(one, Copy(selection, queue.device, dest.stride()))
            stages.finish(one)


def _announced(workload: Iterable[Given], stages: Stages, storage: Storage, form: Format) -> Iterator[_Coming]:
    """Yield the tensors, each when as many more have been announced as the loader announces."""
    waiting: deque[_Coming] = deque()
    for given in workload:
        recipe = Recipe(_Operands(storage, form, given.shape), BF16, 0.5, ValuesError)
        waiting.append(one := _Coming(given, recipe))
        stages.announce(one)
        if len(waiting) > sizes.ANNOUNCED_TENSORS:
            yield waiting.popleft()
    yield from waiting
