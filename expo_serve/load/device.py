"""Loading onto a device: pieces are read into pinned memory, copied by a stream of their own, and combined there.

There are two turns of buffers: while the device copies and combines what one turn holds, the other is filled from
storage. A turn is filled again only after the device has passed the mark that was set after its last piece. Nothing
else waits for the device; whether all values were finite comes back with the mark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from expo_serve.checkpoint.records import Operand
from expo_serve.errors import ExpoError, LoadError
from expo_serve.load import sizes
from expo_serve.load.formula import NotFiniteError, combine_into, combine_unchecked
from expo_serve.load.operands import Memory, Recipe
from expo_serve.load.reader import Buffer
from expo_serve.load.selection import Selection, cut
from expo_serve.load.threads import DaemonPool, default_threads


class Mark(Protocol):
    """A place in a device's queue."""

    def wait(self) -> None:
        """Wait until the device has passed it."""


class Queue(Protocol):
    """Work that a device does in order, beside the stream on which the model itself works.

    The one real queue is :class:`CudaQueue`; tests have one that does its work as late as it may.
    """

    def host_memory(self, size: int) -> torch.Tensor:
        """Return uninitialised bytes on the host that the device can copy while the host goes on."""

    def device_memory(self, size: int) -> torch.Tensor:
        """Return uninitialised bytes on the device."""

    def total_memory(self) -> int:
        """Return the memory of the device in bytes."""

    def begin(self, dest: torch.Tensor) -> None:
        """Order later work after everything the model's stream has been given; later work uses ``dest``."""

    def run(self, work: Callable[[], None]) -> None:
        """Enqueue the tensor operations that ``work`` calls."""

    def mark(self) -> Mark:
        """Mark the end of everything enqueued so far."""

    def finish(self) -> None:
        """Order what the model's stream is given from now on after everything enqueued so far."""


class CudaQueue:
    """A :class:`Queue` of an NVIDIA or AMD device: a stream, and events as marks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def host_memory(self, size: int) -> torch.Tensor:
        try:
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError as error:
            raise LoadError(
                f"no pinned memory: {size} bytes were refused ({error}); raise the limit of locked memory"
            ) from None

    def device_memory(self, size: int) -> torch.Tensor:
        with torch.cuda.stream(self._stream):
            return torch.empty(size, dtype=torch.uint8, device=self._device)

    def total_memory(self) -> int:
        return int(torch.cuda.get_device_properties(self._device).total_memory)

    def begin(self, dest: torch.Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        dest.record_stream(self._stream)

    def run(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def mark(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return _CudaMark(event)

    def finish(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


@dataclass(frozen=True)
class _CudaMark:
    event: torch.cuda.Event

    def wait(self) -> None:
        self.event.synchronize()


def _nothing() -> None:
    """Check nothing: the check of a turn that holds no piece."""


@dataclass
class _Turn:
    """One set of buffers, and the work that the device was last given with it."""

    host: tuple[torch.Tensor, torch.Tensor]
    """Pinned memory of base and of the operand beside it."""
    device: tuple[torch.Tensor, torch.Tensor]
    is_finite: torch.Tensor
    """One byte on the host: whether the last piece was finite."""
    mark: Mark | None = None
    check: Callable[[], None] = _nothing


class Stage:
    """Loads pieces onto one device.

    Args:
        queue: the device's queue.
        stage_bytes: of each operand in each turn; fewer on a device with little memory.
        turns: number of turns, at least 1.
        threads: that read at once.
    """

    def __init__(
        self,
        queue: Queue,
        stage_bytes: int = sizes.STAGE_BYTES,
        turns: int = sizes.STAGE_TURNS,
        threads: int | None = None,
    ) -> None:
        self._queue = queue
        self.piece_bytes = max(8, min(stage_bytes, queue.total_memory() // (2 * turns * sizes.MAX_DEVICE_SHARE)))
        self._turns = [self._new_turn() for _ in range(turns)]
        self._next = 0
        self._failure: ExpoError | None = None
        self._readers = DaemonPool(threads or default_threads(), "expo-stage")

    def _new_turn(self) -> _Turn:
        host, device = self._queue.host_memory, self._queue.device_memory
        size = self.piece_bytes
        return _Turn((host(size), host(size)), (device(size), device(size)), host(1))

    def fill(self, dest: torch.Tensor, selection: Selection, recipe: Recipe) -> None:
        """Read, copy and combine elements into ``dest`` on the device; returns before the device is done.

        Raises:
            ExpoError: a file cannot be read, or a value of an earlier piece was not finite.
        """
        self._queue.begin(dest)
        for out, piece in cut(dest, selection, self.piece_bytes // recipe.operands.widest, self._grain(recipe)):
            turn = self._turns[self._next]
            self._next = (self._next + 1) % len(self._turns)
            self._settle(turn)
            operands = self._read(turn, piece, recipe)
            self._queue.run(partial(_combine, turn, out, piece, operands, recipe))
            turn.mark = self._queue.mark()
            turn.check = partial(_check, out, piece, operands, recipe)

    def wait(self) -> None:
        """Wait until all is written, also for what the model's stream is given from now on.

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
        """Wait until the device is done with a turn's buffers, then look at its finding. A failure is kept."""
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

    def _read(self, turn: _Turn, piece: Selection, recipe: Recipe) -> dict[Operand, torch.Tensor]:
        """Fill the turn's host buffers, by several threads where the elements are contiguous."""

        def memory(start: int, count: int) -> Memory:
            """Return memory for ``count`` elements of each operand, from element ``start`` of the piece on."""
            return lambda operand, size: Buffer(turn.host[_slot(operand)][start * (size // count) :][:size])

        if not piece.is_contiguous:
            return recipe.operands.read(piece, memory(0, max(1, piece.numel)))
        dtypes: dict[Operand, torch.dtype] = {}

        def read(part: Selection) -> None:
            values = recipe.operands.read(part, memory(part.offset - piece.offset, part.numel))
            dtypes.update({operand: value.dtype for operand, value in values.items()})

        index = torch.empty(piece.numel, device="meta")
        parts = cut(index, piece, max(1, sizes.PIECE_BYTES // recipe.operands.widest), self._grain(recipe))
        self._readers.run_all([partial(read, part) for _, part in parts])
        return {
            operand: Buffer(turn.host[_slot(operand)]).values(dtype, piece.shape) for operand, dtype in dtypes.items()
        }

    def _grain(self, recipe: Recipe) -> int:
        """Return the number of elements that are best read together, if they fit into a turn."""
        return recipe.operands.grain if recipe.operands.grain * recipe.operands.widest <= self.piece_bytes else 1


def _slot(operand: Operand) -> int:
    return 0 if operand == "base" else 1


def _combine(
    turn: _Turn, out: torch.Tensor, piece: Selection, operands: dict[Operand, torch.Tensor], recipe: Recipe
) -> None:
    """Enqueue copying and combining one piece."""
    there: dict[Operand, torch.Tensor] = {}
    for name, operand in operands.items():
        size = operand.numel() * operand.element_size()
        memory = turn.device[_slot(name)][:size].copy_(turn.host[_slot(name)][:size], non_blocking=True)
        there[name] = memory.view(operand.dtype).as_strided(operand.shape, operand.stride())
    with torch.no_grad():
        noise = recipe.noise(piece, out.device)
        value = combine_unchecked(out, there, recipe.dtype, recipe.alpha, noise)
        # A finite sum proves finite terms; see combine_into.
        is_finite = value.sum().isfinite() if value.is_floating_point() else torch.ones((), dtype=torch.bool)
        turn.is_finite.copy_(is_finite.view(1).view(torch.uint8), non_blocking=True)


def _check(out: torch.Tensor, piece: Selection, operands: dict[Operand, torch.Tensor], recipe: Recipe) -> None:
    """Find out on the host, which still has the operands, why the device's sum is not finite; it may be an overflow."""
    if recipe.fail is None:
        return
    value = torch.empty(out.shape, dtype=recipe.dtype, device="cpu")
    try:
        combine_into(value, operands, recipe.dtype, recipe.alpha, recipe.noise(piece, value.device))
    except NotFiniteError as error:
        raise recipe.fail(str(error)) from None
    if out.dtype == recipe.dtype and not bool(out.isfinite().all()):  # too large on the device only, by one rounding
        raise recipe.fail("result")


class Stages:
    """One :class:`Stage` for each device of a load, between entering and leaving the context.

    Args:
        threads: that read for each device at once.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._stages: dict[torch.device, Stage] = {}
        self._is_open = False

    def __enter__(self) -> Stages:
        self._is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        for stage in self._stages.values():
            stage.close()
        self._stages = {}

    def onto(self, device: torch.device) -> Stage | None:
        """Return the stage of a device; None where results are made on the host and copied.

        None also outside of the context: layers that vLLM quantises late copy from their lazy tensors after it, and
        nobody would wait for the device then.
        """
        if device.type == "cuda" and device not in self._stages and self._is_open:
            self._stages[device] = self._new(device)
        return self._stages.get(device)

    def _new(self, device: torch.device) -> Stage:
        return Stage(CudaQueue(device), threads=self._threads)

    def wait(self) -> None:
        """Wait until everything is written, as :meth:`Stage.wait` does for one device."""
        for stage in self._stages.values():
            stage.wait()
