"""Pieces of both sides onto a device: read into pinned memory, copied by a stream of their own, combined there.

Two turns of buffers: while the device copies and combines what one turn holds, the other is filled from storage. A
turn is filled again only after the device has passed the mark that was set behind its last piece. Nothing waits for the
device otherwise; whether all values were finite comes back with the mark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from expo_serve.checkpoint.records import Operand
from expo_serve.errors import ExpoError, LoadError
from expo_serve.load.fill import Job
from expo_serve.load.formula import NotFiniteError, combine_into, combine_unchecked
from expo_serve.load.operands import Memory
from expo_serve.load.reader import PIECE_BYTES, Buffer
from expo_serve.load.selection import Selection, cut
from expo_serve.load.threads import Workers, default_threads

STAGE_BYTES = 8 << 20
"""Of each side, in each turn. A copy of 8 MB takes the link far longer than it takes to start."""
TURNS = 2
MAX_SHARE = 64
"""The buffers on the device take at most one part in so many of its memory."""


class Mark(Protocol):
    """A place in a queue."""

    def wait(self) -> None:
        """Until the device has passed it."""


class Queue(Protocol):
    """Work that a device does in order, beside the stream on which the model itself works."""

    def host_memory(self, size: int) -> torch.Tensor:
        """Uninitialised bytes on the host that the device can copy from and to while the host goes on."""

    def device_memory(self, size: int) -> torch.Tensor:
        """Uninitialised bytes on the device."""

    def total_memory(self) -> int:
        """Of the device, in bytes."""

    def begin(self, dest: torch.Tensor) -> None:
        """Let what follows come after all that the model's stream was given; ``dest`` is used by what follows."""

    def run(self, work: Callable[[], None]) -> None:
        """Enqueue what ``work`` does with tensors."""

    def mark(self) -> Mark:
        """Behind all that was enqueued."""

    def finish(self) -> None:
        """Let what the model's stream is given from now on come after all that was enqueued."""


class CudaQueue:
    """A :class:`Queue` of an NVIDIA or AMD device: a stream, and events as marks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def host_memory(self, size: int) -> torch.Tensor:
        """See :class:`Queue`."""
        try:
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError as error:
            raise LoadError(
                f"no pinned memory: {size} bytes were refused ({error}); raise the limit of locked memory"
            ) from None

    def device_memory(self, size: int) -> torch.Tensor:
        """See :class:`Queue`."""
        with torch.cuda.stream(self._stream):
            return torch.empty(size, dtype=torch.uint8, device=self._device)

    def total_memory(self) -> int:
        """See :class:`Queue`."""
        return int(torch.cuda.get_device_properties(self._device).total_memory)

    def begin(self, dest: torch.Tensor) -> None:
        """See :class:`Queue`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        dest.record_stream(self._stream)

    def run(self, work: Callable[[], None]) -> None:
        """See :class:`Queue`."""
        with torch.cuda.stream(self._stream):
            work()

    def mark(self) -> Mark:
        """See :class:`Queue`."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return _CudaMark(event)

    def finish(self) -> None:
        """See :class:`Queue`."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


@dataclass(frozen=True)
class _CudaMark:
    event: torch.cuda.Event

    def wait(self) -> None:
        self.event.synchronize()


def _nothing() -> None:
    """What a turn that holds nothing has to be checked for."""


@dataclass
class _Turn:
    """One set of buffers, and what the device was last given of it."""

    host: tuple[torch.Tensor, torch.Tensor]
    """Of base, and of what stands beside it."""
    device: tuple[torch.Tensor, torch.Tensor]
    is_finite: torch.Tensor
    """One byte on the host."""
    mark: Mark | None = None
    check: Callable[[], None] = _nothing


class Stage:
    """The way onto one device.

    Args:
        queue: the device's.
        stage_bytes: of each side in each turn; less on a device with little memory.
        turns: at least 1.
        threads: that read at once.
    """

    def __init__(
        self, queue: Queue, stage_bytes: int = STAGE_BYTES, turns: int = TURNS, threads: int | None = None
    ) -> None:
        self._queue = queue
        self.piece_bytes = max(8, min(stage_bytes, queue.total_memory() // (2 * turns * MAX_SHARE)))
        self._turns = [self._new_turn() for _ in range(turns)]
        self._next = 0
        self._failure: ExpoError | None = None
        self._readers = Workers(threads or default_threads(), "expo-stage")

    def _new_turn(self) -> _Turn:
        host, device = self._queue.host_memory, self._queue.device_memory
        size = self.piece_bytes
        return _Turn((host(size), host(size)), (device(size), device(size)), host(1))

    def fill(self, dest: torch.Tensor, elements: Selection, job: Job) -> None:
        """Read, copy and combine elements into ``dest`` on the device; returns before the device is done.

        Raises:
            ExpoError: a file cannot be read, or a value of an earlier piece was not finite.
        """
        self._queue.begin(dest)
        for out, piece in cut(dest, elements, self.piece_bytes // job.sides.widest, self._grain(job)):
            turn = self._turns[self._next]
            self._next = (self._next + 1) % len(self._turns)
            self._settle(turn)
            operands = self._read(turn, piece, job)
            self._queue.run(partial(_combine, turn, out, operands, job))
            turn.mark = self._queue.mark()
            turn.check = partial(_check, out, operands, job)

    def wait(self) -> None:
        """Until all is written, also for what the model's stream is given from now on.

        Raises:
            ExpoError: a value was not finite.
        """
        self._queue.finish()
        for turn in self._turns:
            self._settle(turn)
        if self._failure:
            raise self._failure

    def close(self) -> None:
        """Let the reading threads end."""
        self._readers.close()

    def _settle(self, turn: _Turn) -> None:
        """Until the device has done with a turn's buffers; then look at what it found. A failure stays."""
        if turn.mark is None:
            return
        turn.mark.wait()
        check, turn.mark, turn.check = turn.check, None, _nothing  # which would hold the parameter's memory
        if not turn.is_finite.item():
            try:
                check()
            except ExpoError as error:
                self._failure = self._failure or error
                raise

    def _read(self, turn: _Turn, piece: Selection, job: Job) -> dict[Operand, torch.Tensor]:
        """Fill the turn's host buffers, by several threads where the elements lie one behind the other."""

        def memory(start: int, count: int) -> Memory:
            """So many elements of each side, from one of the piece's on."""
            return lambda side, size: Buffer(turn.host[_place(side)][start * (size // count) :][:size])

        if not piece.is_contiguous:
            return job.sides.read(piece, memory(0, max(1, piece.numel)))
        dtypes: dict[Operand, torch.dtype] = {}

        def read(part: Selection) -> None:
            values = job.sides.read(part, memory(part.offset - piece.offset, part.numel))
            dtypes.update({side: value.dtype for side, value in values.items()})

        index = torch.empty(piece.numel, device="meta")
        parts = cut(index, piece, max(1, PIECE_BYTES // job.sides.widest), self._grain(job))
        self._readers.do_all([partial(read, part) for _, part in parts])
        return {side: Buffer(turn.host[_place(side)]).values(dtype, piece.shape) for side, dtype in dtypes.items()}

    def _grain(self, job: Job) -> int:
        """What is best read together, where it fits into a turn."""
        return job.sides.grain if job.sides.grain * job.sides.widest <= self.piece_bytes else 1


def _place(side: Operand) -> int:
    return 0 if side == "base" else 1


def _combine(turn: _Turn, out: torch.Tensor, operands: dict[Operand, torch.Tensor], job: Job) -> None:
    """What the device does with one piece."""
    there: dict[Operand, torch.Tensor] = {}
    for side, operand in operands.items():
        size = operand.numel() * operand.element_size()
        memory = turn.device[_place(side)][:size].copy_(turn.host[_place(side)][:size], non_blocking=True)
        there[side] = memory.view(operand.dtype).as_strided(operand.shape, operand.stride())
    with torch.no_grad():
        value = combine_unchecked(out, there, job.dtype, job.alpha)
        # A finite sum proves finite terms; see combine_into.
        is_finite = value.sum().isfinite() if value.is_floating_point() else torch.ones((), dtype=torch.bool)
        turn.is_finite.copy_(is_finite.view(1).view(torch.uint8), non_blocking=True)


def _check(out: torch.Tensor, operands: dict[Operand, torch.Tensor], job: Job) -> None:
    """The device's sum was not finite, which may be an overflow: find out on the host, where the operands still are."""
    if job.fail is None:
        return
    value = torch.empty(out.shape, dtype=job.dtype, device="cpu")
    try:
        combine_into(value, operands, job.dtype, job.alpha)
    except NotFiniteError as error:
        raise job.fail(str(error)) from None
    if out.dtype == job.dtype and not bool(out.isfinite().all()):  # too large on the device only, by one rounding
        raise job.fail("result")


class Stages:
    """The ways onto the devices of one load, between entering and leaving the context.

    Args:
        threads: that read for each device at once.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._stages: dict[torch.device, Stage] = {}
        self._ended = False

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        for stage in self._stages.values():
            stage.close()
        self._stages = {}

    def onto(self, device: torch.device) -> Stage | None:
        """The way onto a device; None where there is none but copying.

        Also after the end: layers that vLLM quantises late copy from their lazy tensors then, and nobody would wait.
        """
        if device.type == "cuda" and device not in self._stages and not self._ended:
            self._stages[device] = self._new(device)
        return self._stages.get(device)

    def _new(self, device: torch.device) -> Stage:
        return Stage(CudaQueue(device), threads=self._threads)

    def wait(self) -> None:
        """See :meth:`Stage.wait`."""
        for stage in self._stages.values():
            stage.wait()
