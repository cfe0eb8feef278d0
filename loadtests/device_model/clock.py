"""Virtual time: what each part of a load is busy with, and until when. Times are in seconds, sizes in bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from expo_serve.load.device_queue import Mark

PARTS = ("reading", "copying", "combining", "python")


@dataclass(frozen=True)
class Rates:
    """What a machine does, for one rank."""

    readers: int
    reader_bytes: float
    """A second, by one thread, of runs that are long, from the page cache."""
    storage_bytes: float = float("inf")
    """A second, by all threads together."""
    request_seconds: float = 0.0
    """Of each read of :data:`REQUEST_BYTES`, beside its bytes: a round trip."""
    run_seconds: float = 150e-9
    """Of each contiguous run of a slice along rows, beside its bytes: a system call."""
    link_bytes: float = 55e9
    copy_seconds: float = 4e-6
    """Of each copy, beside its bytes."""
    memory_bytes: float = 2e12
    """A second, that the device's memory reads or writes."""
    launch_seconds: float = 3e-6
    """Of each kernel on the device, beside its bytes."""
    tensor_seconds: float = 350e-6
    """Of Python, for each tensor that the model is given: what vLLM does with its name, and slices."""
    copy_call_seconds: float = 60e-6
    """Of Python, for each copy into a parameter."""
    call_seconds: float = 6e-6
    """Of Python, for each operation that it gives to a device."""


REQUEST_BYTES = 1 << 20


@dataclass(eq=False)
class VirtualMark:
    """The end of some work of a device."""

    clock: Clock
    end: float

    def wait(self) -> None:
        """Let the thread that loads the model go on at that time; a thread that reads has been told it before."""
        if not self.clock.is_reading:
            self.clock.now = max(self.clock.now, self.end)

    def is_passed(self) -> bool:
        """Return whether that time has come."""
        return self.end <= self.clock.now


@dataclass
class Clock:
    """When each part is free again, and how long each was busy."""

    rates: Rates
    now: float = 0.0
    """Of the thread that loads the model."""
    is_reading: bool = False
    copies_free: float = 0.0
    model_free: float = 0.0
    storage_free: float = 0.0
    begun: float = 0.0
    """Since when what is read now could be read."""
    read_end: float = 0.0
    busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    own: float = 0.0
    """Of the threads that read, without waiting for the storage."""
    read_total: float = 0.0
    """Bytes."""

    def __post_init__(self) -> None:
        self.readers = [0.0] * self.rates.readers

    def think(self, seconds: float) -> None:
        """Let the thread that loads the model compute."""
        self.now += seconds
        self.busy["python"] += seconds

    def read(self, size: float, runs: int, seconds: float = 0.0) -> None:
        """Let the thread that is free first read so many bytes, in so many runs, and compute for some seconds."""
        rates = self.rates
        index = self.readers.index(min(self.readers))
        start = max(self.readers[index], self.begun)
        own = size / rates.reader_bytes + runs * rates.run_seconds + seconds
        own += -(-size // REQUEST_BYTES) * rates.request_seconds
        self.storage_free = max(self.storage_free, start) + size / rates.storage_bytes
        end = max(start + own, self.storage_free)
        self.readers[index] = end
        self.read_end = max(self.read_end, end)
        self.own += own
        self.read_total += size

    @property
    def reading_seconds(self) -> float:
        """Return how long all threads together, or the storage, were busy."""
        return max(self.own / self.rates.readers, self.read_total / self.rates.storage_bytes)


class LargeDevice:
    """What both queues have: the memory of a large device."""

    device = torch.device("cpu")

    def host_memory(self, size: int) -> torch.Tensor:
        """Return memory, all zeros: sums of it are finite."""
        return torch.zeros(size, dtype=torch.uint8, device="cpu")

    device_memory = host_memory

    def total_memory(self) -> int:
        """Return that of a large device."""
        return 80 << 30


class VirtualQueue(LargeDevice):
    """A :class:`~expo_serve.load.device_queue.Queue` that takes time and does nothing."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.launches, self.traffic = 1, 0.0
        """Of the work that is enqueued next: operations, and bytes that they move in the device's memory."""

    def upload(self, dest: torch.Tensor, source: torch.Tensor, after: Sequence[Mark]) -> Mark:
        """Take the time of a copy."""
        clock, rates = self.clock, self.clock.rates
        start = max([clock.copies_free, clock.read_end, *(_end(mark) for mark in after)])
        seconds = rates.copy_seconds + dest.numel() / rates.link_bytes
        clock.copies_free = start + seconds
        clock.busy["copying"] += seconds
        return VirtualMark(clock, clock.copies_free)

    def run(self, work: Callable[[], None], after: Sequence[Mark]) -> Mark:
        """Take the time of kernels, and of giving them to the device."""
        clock, rates = self.clock, self.clock.rates
        clock.think(self.launches * rates.call_seconds)
        start = max([clock.now, clock.model_free, *map(_end, after)])
        seconds = self.launches * rates.launch_seconds + self.traffic / rates.memory_bytes
        clock.model_free = start + seconds
        clock.busy["combining"] += seconds
        self.launches, self.traffic = 1, 0.0
        return VirtualMark(clock, clock.model_free)


def _end(mark: Any) -> float:
    assert isinstance(mark, VirtualMark)
    return mark.end
