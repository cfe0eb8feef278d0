"""What the queue of a GPU asks of CUDA, in which order; a record of calls stands where CUDA is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from expo_serve.errors import LoadError
from expo_serve.load import device_queue
from expo_serve.load.device_queue import CudaQueue, copied_to

CUDA = torch.device("cuda", 1)
CPU = torch.device("cpu")


class Calls:
    """Streams and events that note what is asked of them."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.model = self.stream("model")
        self.current = [self.model]

    def stream(self, name: str) -> Any:
        """Make a stream."""
        calls = self

        class Stream:
            device = CUDA

            def wait_event(self, event: Any) -> None:
                calls.made.append(f"{name} waits for {event.where}")

            def __repr__(self) -> str:
                return name

        return Stream()

    def event(self, **_: Any) -> Any:
        """Make an event."""
        calls = self

        class Event:
            where = ""

            def record(self, stream: Any) -> None:
                self.where = f"{stream} {len(calls.made)}"
                calls.made.append(f"event in {stream}")

            def synchronize(self) -> None:
                calls.made.append(f"host waits for {self.where}")

        return Event()

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """Make a stream the current one."""
        self.current.append(stream)
        yield
        self.current.pop()

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        """Make a device the current one."""
        self.made.append(f"on {device}")
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What is called of ``torch.cuda``."""
    calls = Calls()
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: calls.stream("copies"))
    monkeypatch.setattr(torch.cuda, "Event", calls.event)
    monkeypatch.setattr(torch.cuda, "stream", calls.on)
    monkeypatch.setattr(torch.cuda, "device", calls.device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: calls.current[-1])
    return calls


def test_copies_and_work_wait_for_each_other_only(calls: Calls) -> None:
    queue = CudaQueue(CUDA)
    host, there = torch.arange(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)
    combined = queue.run(lambda: calls.made.append("combine"), ())
    uploaded = queue.upload(there, host, [combined])
    again = queue.run(lambda: calls.made.append("combine"), [uploaded, combined])
    assert torch.equal(there, host)
    assert calls.made == [
        *("combine", "event in model"),
        *("on cuda:1", "copies waits for model 1", "event in copies"),
        *("model waits for copies 4", "combine", "event in model"),  # its own stream's order needs no wait
    ]
    calls.made.clear()
    again.wait()
    assert calls.made == ["on cuda:1", "host waits for model 7"]


def test_work_on_another_stream_waits_for_what_was_enqueued_before(calls: Calls) -> None:
    queue = CudaQueue(CUDA)
    first = queue.run(lambda: None, ())
    with calls.on(calls.stream("other")):
        queue.run(lambda: None, [first])
    assert calls.made == ["event in model", "other waits for model 0", "event in other"]


def test_pinned_memory_that_is_refused_is_plain_and_said_once(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr(device_queue, "warn", warned.append)
    empty = torch.empty

    def refuse(*arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: operation not supported\nmore")
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    queue = CudaQueue(CUDA)
    for _ in range(3):
        memory = queue.host_memory(16)
        assert (memory.numel(), memory.dtype, memory.device) == (16, torch.uint8, CPU)
    assert warned == [
        "no pinned memory (CUDA error: operation not supported): weights are copied to the device at half the speed"
    ]


def test_out_of_memory_says_what_the_load_needs(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 MiB\nmore")

    def work() -> None:
        fail()

    queue = CudaQueue(CUDA)
    with pytest.raises(LoadError, match=r"needs some 100 MB .* \(CUDA out of memory. Tried to allocate 8 MiB\)"):
        queue.run(work, ())
    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(LoadError, match=r"out of memory on cuda:1: .* needs 16 MB of buffers beside the weights"):
        queue.device_memory(16_000_000)


def test_small_things_are_copied_without_pinned_memory_too() -> None:
    values = torch.arange(3)
    assert torch.equal(copied_to(CPU, values), values)
    assert copied_to(torch.device("meta"), values).is_meta
