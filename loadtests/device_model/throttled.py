"""The same pipeline in real time: real threads and queues, whose reads, copies and kernels sleep as long as they take.

What the model of time says for these rates must be what this takes: that checks the model, not a device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from expo_serve.load.device_queue import Mark
from expo_serve.load.stage import Stage
from loadtests.device_model.clock import REQUEST_BYTES, LargeDevice, Rates
from loadtests.device_model.pipeline import Format, Given, drive


class _RealMark:
    """The end of some work."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def reach(self) -> None:
        """Set it."""
        self._event.set()

    def wait(self) -> None:
        """Wait for it."""
        self._event.wait()

    def is_passed(self) -> bool:
        """Return whether it was reached."""
        return self._event.is_set()


class _Storage:
    """Reads that sleep: each thread at its own rate, and all of them at that of the storage."""

    def __init__(self, rates: Rates) -> None:
        self._rates = rates
        self._lock = threading.Lock()
        self._free = 0.0

    def read(self, size: float, runs: int, seconds: float = 0.0) -> None:
        """Sleep as long as a read takes."""
        rates = self._rates
        start = time.monotonic()
        own = size / rates.reader_bytes + runs * rates.run_seconds + seconds
        own += -(-size // REQUEST_BYTES) * rates.request_seconds
        with self._lock:
            self._free = until = max(self._free, start) + size / rates.storage_bytes
        _sleep_until(max(start + own, until))


class _SleepingQueue(LargeDevice):
    """A device whose streams are threads that sleep."""

    def __init__(self, rates: Rates) -> None:
        self._rates = rates
        self._copies, self._model = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.launches, self.traffic = 1, 0.0

    def upload(self, dest: torch.Tensor, source: torch.Tensor, after: Sequence[Mark]) -> Mark:
        """Sleep in the stream of copies."""
        seconds = self._rates.copy_seconds + dest.numel() / self._rates.link_bytes
        return _enqueue(self._copies, seconds, after)

    def run(self, work: Callable[[], None], after: Sequence[Mark]) -> Mark:
        """Sleep in the model's stream."""
        seconds = self.launches * self._rates.launch_seconds + self.traffic / self._rates.memory_bytes
        self.launches, self.traffic = 1, 0.0
        return _enqueue(self._model, seconds, after)

    def finish(self) -> None:
        """Wait until all is done."""
        self._copies.shutdown()
        self._model.shutdown()


class _RealStage(Stage):
    """A stage that says what it enqueues."""

    def __init__(self, queue: _SleepingQueue, form: Format, readers: int) -> None:
        super().__init__(queue, readers)
        self._sleeping, self._form = queue, form

    def _combine(self, out: torch.Tensor, piece: Any) -> None:
        self._sleeping.launches = self._form.launches
        self._sleeping.traffic = piece.transfer.selection.numel * self._form.traffic
        super()._combine(out, piece)


def measure(workload: Iterable[Given], form: Format, rates: Rates) -> float:
    """Return the seconds that a load takes."""
    queue, storage = _SleepingQueue(rates), _Storage(rates)
    stage = _RealStage(queue, form, rates.readers)
    began = time.monotonic()
    drive(workload, form, stage, queue, storage, rates)
    queue.finish()
    return time.monotonic() - began


def _enqueue(stream: ThreadPoolExecutor, seconds: float, after: Sequence[Mark]) -> Mark:
    mark = _RealMark()

    def work() -> None:
        for other in after:
            other.wait()
        _sleep_until(time.monotonic() + seconds)
        mark.reach()

    stream.submit(work)
    return mark


def _sleep_until(moment: float) -> None:
    if (left := moment - time.monotonic()) > 0:
        time.sleep(left)
