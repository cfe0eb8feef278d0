"""A device as a load sees it: memory, copies to it on a stream of their own, and work on the model's own stream.

What is written into a parameter is enqueued on the stream on which the model itself works, before the copy into the
lazy tensor returns. So whatever the model does next with that parameter, by whatever library, comes after it, and what
the model did before comes before it: the device keeps the order, and nobody has to look at operations. Only the copies
of checkpoint bytes go another way, from memory of ours to memory of ours, and events order them against the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from expo_serve.errors import LoadError, warn

_MOST_PINNED_BYTES = 16 << 20
"""Of a small copy: torch keeps what was pinned once until the process ends."""


class Mark(Protocol):
    """A place in one of a device's streams."""

    def wait(self) -> None:
        """Wait until the device has passed it."""

    def is_passed(self) -> bool:
        """Return whether the device has passed it, without waiting."""


class Queue(Protocol):
    """What a device does for a load; :class:`CudaQueue` is the real one, tests have a simulator."""

    device: torch.device

    def host_memory(self, size: int) -> torch.Tensor:
        """Return uninitialised bytes on the host that the device can copy while the host goes on."""

    def device_memory(self, size: int) -> torch.Tensor:
        """Return uninitialised bytes on the device.

        Raises:
            LoadError: there are not that many left.
        """

    def total_memory(self) -> int:
        """Return the memory of the device in bytes."""

    def upload(self, dest: torch.Tensor, source: torch.Tensor, after: Sequence[Mark]) -> Mark:
        """Enqueue a copy from host memory, on the stream of copies, which keeps their order; safe from any thread.

        Args:
            dest: of :meth:`device_memory`.
            source: of :meth:`host_memory`, of the same size.
            after: marks of the model's stream that the device passes first.
        """

    def run(self, work: Callable[[], None], after: Sequence[Mark]) -> Mark:
        """Enqueue tensor operations on the model's current stream.

        Args:
            work: calls them.
            after: marks of any stream that the device passes first; those of this one it has passed anyway.

        Raises:
            LoadError: there is no memory for what they compute.
        """


class CudaQueue:
    """A :class:`Queue` of an NVIDIA or AMD device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._can_pin = True

    def host_memory(self, size: int) -> torch.Tensor:
        if self._can_pin:
            try:
                return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
            except RuntimeError as error:
                self._can_pin = False
                warn(f"no pinned memory ({_first_line(error)}): weights are copied to the device at half the speed")
        return torch.empty(size, dtype=torch.uint8, device="cpu")  # its copies return when they have been staged

    def device_memory(self, size: int) -> torch.Tensor:
        try:
            return torch.empty(size, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(size, error) from None

    def total_memory(self) -> int:
        return int(torch.cuda.get_device_properties(self.device).total_memory)

    def upload(self, dest: torch.Tensor, source: torch.Tensor, after: Sequence[Mark]) -> Mark:
        with torch.cuda.device(self.device), torch.cuda.stream(self._copies):
            for mark in after:
                assert isinstance(mark, _CudaMark)
                self._copies.wait_event(mark.event)
            dest.copy_(source, non_blocking=True)
            return _mark(self._copies)

    def run(self, work: Callable[[], None], after: Sequence[Mark]) -> Mark:
        stream = torch.cuda.current_stream(self.device)
        for mark in after:
            assert isinstance(mark, _CudaMark)
            if mark.stream != stream:
                stream.wait_event(mark.event)
        try:
            work()
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(0, error) from None
        return _mark(stream)

    def _out_of_memory(self, size: int, error: Exception) -> LoadError:
        what = f"{size / 1e6:.0f} MB of buffers" if size else "some 100 MB for what it computes"
        return LoadError(
            f"out of memory on {self.device}: while it loads, expo-serve needs {what} beside the weights "
            f"({_first_line(error)}); use a smaller model or more devices"
        )


@dataclass(frozen=True)
class _CudaMark:
    event: torch.cuda.Event
    stream: torch.cuda.Stream

    def wait(self) -> None:
        with torch.cuda.device(self.stream.device):  # else it could make a context on the first one
            self.event.synchronize()

    def is_passed(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]


def _mark(stream: Any) -> _CudaMark:
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # a wait lets the core go
    event.record(stream)
    return _CudaMark(event, stream)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def copied_to(device: torch.device, values: torch.Tensor) -> torch.Tensor:
    """Return a copy of host memory on a device, enqueued on the model's current stream.

    The host waits for it, and so for all that was enqueued before, only where it is large or memory cannot be pinned.
    """
    if device.type == "cuda" and values.nbytes <= _MOST_PINNED_BYTES:
        with suppress(RuntimeError):  # refused: its copy returns when it has been staged
            values = values.pin_memory()
    return values.to(device, non_blocking=True)
