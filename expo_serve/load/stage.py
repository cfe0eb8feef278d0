"""Loading onto a device: threads read into pinned memory, a stream copies that, and the model's stream combines it.

The memory is a ring of turns. A turn is read by all threads, copied as one, and free again when its pieces have been
combined; its memory on the host is free as soon as it has been copied. Pieces that the model is expected to ask for
next (:mod:`.forecast`) are read and copied while Python still walks the model, so that a copy into a parameter finds
its bytes on the device. What was not expected is read when it is asked for, in turns that are kept for that.

Only the combining touches memory of the model, and it is enqueued before the copy into the lazy tensor returns, on the
model's own stream: see :mod:`.device_queue`. Nothing waits for the device but a thread that wants to read into memory
that is still being copied. Whether all values were finite comes back later: see :mod:`.findings`.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from expo_serve.load import device_low_rank, sizes
from expo_serve.load.device_queue import Mark, Queue
from expo_serve.load.findings import Findings
from expo_serve.load.lora import LowRankOperands
from expo_serve.load.operands import Recipe
from expo_serve.load.packed import PackedOperands
from expo_serve.load.packed_transfer import PackedTransfer
from expo_serve.load.selection import FileSpan, Selection, cut
from expo_serve.load.threads import LOOK_SECONDS, Countdown, DaemonPool, Prefetch, Task
from expo_serve.load.transfer import StoredTransfer, Transfer

_KEPT_TURNS = 2
"""Turns for what was not expected: one is read while the other is copied and combined."""
_MOST_PIECES = 64
"""In a turn."""


@dataclass(eq=False)
class _Turn:
    """One part of the ring: memory on both sides, and the pieces that are in it."""

    host: torch.Tensor
    device: torch.Tensor
    sums: torch.Tensor
    """fp32, on the device: the sum of each piece's values."""
    combined: list[Mark]
    """Ends of what uses the memory on the device. The loading thread may change it while all has arrived, and the last
    reader before that."""
    pieces: list[_Piece] = field(default_factory=list)
    left: int = 0
    """Pieces that have been neither combined nor given up."""
    uploaded: Mark | None = None
    """End of the last of its copies, which keep their order; None before any."""
    arrived: threading.Event = field(default_factory=threading.Event)
    """Set when all has been read, and its copying enqueued."""


@dataclass(eq=False)
class _Piece:
    """A transfer, and where it is."""

    transfer: Transfer
    turn: _Turn | None = None
    place: int = 0
    number: int = 0
    """In its turn."""
    failure: BaseException | None = None
    """Why it could not be read."""
    is_combined: bool = False

    @property
    def is_checked(self) -> bool:
        """Return True if its values have to be finite."""
        return self.transfer.recipe.dtype.is_floating_point and self.transfer.recipe.fail is not None


class Stage:
    """Loads pieces onto one device; only the thread that loads the model may use it.

    Args:
        queue: what the device does.
        threads: that read at once.
        stage_bytes: of each turn; fewer on a device with little memory.
        turns: number of turns, at least 1.
        prefetch: brings cold files into the page cache; without one, the threads read them.
    """

    def __init__(
        self,
        queue: Queue,
        threads: int,
        stage_bytes: int = sizes.STAGE_BYTES,
        turns: int = sizes.STAGE_TURNS,
        prefetch: Prefetch | None = None,
    ) -> None:
        self._queue, self._threads, self._prefetch = queue, threads, prefetch
        self.turn_bytes = max(64, min(stage_bytes, queue.total_memory() // (turns * sizes.MAX_DEVICE_SHARE)))
        self._kept = min(_KEPT_TURNS, turns)
        self._free = deque(self._new_turn() for _ in range(turns))
        self._expected: dict[tuple[int, Selection], _Piece] = {}
        """In the order in which they are expected; those that are being read come first."""
        self._unread: deque[_Piece] = deque()
        """Of those that are expected."""
        self._findings = Findings(queue, _MOST_PIECES)
        self._readers = DaemonPool(threads, "expo-stage", on_all_cores=False)  # they read into memory of this node
        self._thread = threading.get_ident()

    def _new_turn(self) -> _Turn:
        host, device = self._queue.host_memory, self._queue.device_memory
        turn = host(self.turn_bytes), device(self.turn_bytes), device(4 * _MOST_PIECES).view(torch.float32)
        # What the model has freed, and its stream still uses, may be what was allocated.
        return _Turn(*turn, combined=[self._queue.run(_nothing, ())])

    def fill(self, dest: torch.Tensor, selection: Selection, recipe: Recipe) -> None:
        """Read, copy and combine elements into ``dest`` on the device; returns before the device is done.

        Raises:
            ExpoError: a file cannot be read, or a value of an earlier piece was not finite.
        """
        assert threading.get_ident() == self._thread, "a stage belongs to the thread that loads the model"
        self._findings.look()
        todo = [(out, self._piece(recipe, chosen)) for out, chosen in self._cut(dest, selection, recipe)]
        unread = deque(piece for _, piece in todo if piece.turn is None)
        try:
            for out, piece in todo:
                self._read_some(unread, kept=0)
                self._combine(out, piece)
        except BaseException:
            self._give_up([piece for _, piece in todo])
            raise
        self._read_some(self._unread, self._kept)

    def run(self, work: Callable[[], None]) -> Mark:
        """Enqueue tensor operations behind what was filled."""
        return self._queue.run(work, ())

    def expect(self, dest: torch.Tensor, selection: Selection, recipe: Recipe) -> None:
        """Read elements ahead that will most likely be asked for.

        Args:
            dest: of the shape and strides that it will have, on the meta device.
            selection: which elements.
            recipe: the object that :meth:`fill` will be given.
        """
        for _, chosen in self._cut(dest, selection, recipe):
            key = id(recipe), chosen
            if key not in self._expected:  # one that goes to two places is read ahead for the first of them
                self._expected[key] = piece = _Piece(self._transfer(recipe, chosen))
                self._unread.append(piece)
        self._read_some(self._unread, self._kept)

    @property
    def wants_more(self) -> bool:
        """Return True where more could be read ahead than is expected."""
        return len(self._unread) < _MOST_PIECES

    def give_up(self, recipes: Iterable[Recipe]) -> None:
        """Expect nothing of these recipes any more: their tensor is done with."""
        gone = {id(recipe) for recipe in recipes}
        pieces = [self._expected.pop(key) for key in list(self._expected) if key[0] in gone]
        for piece in pieces:
            if piece.turn is None:
                self._unread.remove(piece)
        self._give_up(pieces)

    def _give_up(self, pieces: Iterable[_Piece], until: float = math.inf) -> None:
        """Set the memory of pieces free, once nothing is written to it any more."""
        for piece in pieces:
            if piece.turn is not None and _has_arrived(piece.turn, until):
                self._release(piece)

    def wait(self) -> None:
        """Wait until the device has done everything, and look at what it has found.

        Raises:
            ExpoError: a value was not finite.
        """
        self._findings.look(wait=True)

    def close(self, until: float | None = None) -> None:
        """Let the threads end, and give the memory back once nothing uses it.

        Args:
            until: the latest time by the monotonic clock to wait for reads, which keep their memory if they are longer;
                None to wait for all.
        """
        self._give_up(self._expected.values(), math.inf if until is None else until)
        for turn in self._free:
            for mark in _uses(turn):
                mark.wait()
        self._expected.clear()
        self._unread.clear()
        self._findings.forget()
        self._free.clear()
        self._readers.close(until)

    def _cut(
        self, dest: torch.Tensor, selection: Selection, recipe: Recipe
    ) -> Iterable[tuple[torch.Tensor, Selection]]:
        operands = recipe.operands
        width = sum(dtype.itemsize for dtype in operands.dtypes.values())
        limit = max(1, (self.turn_bytes - 16 * len(operands.dtypes)) // width)
        return cut(dest, selection, limit, operands.grain if operands.grain <= limit else 1)

    def _piece(self, recipe: Recipe, selection: Selection) -> _Piece:
        """Return the piece that was expected, or a new one."""
        piece = self._expected.pop((id(recipe), selection), None)
        if piece is None:
            return _Piece(self._transfer(recipe, selection))
        if piece.turn is None:
            self._unread.remove(piece)
        return piece

    def _transfer(self, recipe: Recipe, selection: Selection) -> Transfer:
        return _transfer_of(recipe, selection, self._queue.device, self.turn_bytes)

    def _read_some(self, unread: deque[_Piece], kept: int) -> None:
        """Begin to read pieces, several in a turn where they are small, but leave so many turns free."""
        while unread and len(self._free) > kept:
            turn = self._free.popleft()
            turn.pieces, place = [], 0
            while unread and len(turn.pieces) < _MOST_PIECES:
                size = unread[0].transfer.size
                if turn.pieces and place + size > self.turn_bytes:
                    break
                piece = unread.popleft()
                piece.turn, piece.place, piece.number = turn, place, len(turn.pieces)
                turn.pieces.append(piece)
                place += size
            self._read(turn)

    def _read(self, turn: _Turn) -> None:
        """Let the threads read a turn."""
        turn.left = len(turn.pieces)
        turn.arrived.clear()
        try:
            self._begin_to_read(turn)
        except BaseException as error:  # a signal: nobody may wait for what has not begun
            _fail(turn, error)
            turn.arrived.set()
            raise

    def _begin_to_read(self, turn: _Turn) -> None:
        tasks = [(piece, task) for piece in turn.pieces for task in self._reads(piece, turn)]
        spans = [span for piece in turn.pieces for span in _spans(piece)]
        arrived = Countdown(max(1, len(tasks)), partial(self._upload, turn))

        def submit() -> None:
            for piece, task in tasks:
                self._readers.submit(partial(_do, task, piece, turn, arrived))
            if not tasks:
                arrived()

        if not (self._prefetch and self._prefetch.defer(spans, submit)):
            submit()

    def _reads(self, piece: _Piece, turn: _Turn) -> Sequence[Task]:
        end = piece.place + piece.transfer.size
        return piece.transfer.reads(turn.host[piece.place : end], self._threads)

    def _upload(self, turn: _Turn) -> None:
        """Enqueue the copying of a turn; the thread calls it that has read the last of it."""
        try:
            read = [piece for piece in turn.pieces if piece.failure is None]
            ranges = _joined(piece.place + at for piece in read for one in piece.transfer.ranges() for at in one)
            after = turn.combined
            for start, end in ranges:
                turn.uploaded = self._queue.upload(turn.device[start:end], turn.host[start:end], after)
                after, turn.combined = [], []  # the end of this one comes after them
        except BaseException as error:  # noqa: BLE001 - whoever asks for a piece of it raises it
            _fail(turn, error)
        turn.arrived.set()

    def _combine(self, out: torch.Tensor, piece: _Piece) -> None:
        """Enqueue the combining of a piece, behind its copying."""
        turn = piece.turn
        assert turn is not None
        _has_arrived(turn)
        if piece.failure:
            self._release(piece)
            raise piece.failure
        memory = turn.device[piece.place : piece.place + piece.transfer.size]
        after = [turn.uploaded] if turn.uploaded else []
        turn.combined.append(self._queue.run(partial(_compute, out, piece, memory, turn.sums), after))
        piece.is_combined = True
        self._release(piece)

    def _release(self, piece: _Piece) -> None:
        """Note that a piece is done with; the last one of a turn sets it free."""
        turn, piece.turn = piece.turn, None
        assert turn is not None
        turn.left -= 1
        if turn.left == 0:
            if checked := [piece for piece in turn.pieces if piece.is_checked and piece.is_combined]:
                transfers = {piece.number: piece.transfer for piece in checked}
                turn.combined.append(self._findings.bring(turn.sums, transfers, turn.combined))
            turn.pieces = []
            self._free.append(turn)


def _uses(turn: _Turn) -> list[Mark]:
    """Return the ends of what uses the memory of a turn, on either side."""
    return [*([turn.uploaded] if turn.uploaded else []), *turn.combined]


def _nothing() -> None:
    """Do nothing: only the order counts."""


def _has_arrived(turn: _Turn, until: float = math.inf) -> bool:
    """Wait for a turn, but not without end: a signal that comes just before a wait is looked at after it only.

    Args:
        turn: which has been given to the threads.
        until: the latest time by the monotonic clock.
    """
    while not turn.arrived.wait(max(0.0, min(LOOK_SECONDS, until - time.monotonic()))):
        if time.monotonic() >= until:
            return False
    return True


def _fail(turn: _Turn, error: BaseException) -> None:
    for piece in turn.pieces:
        piece.failure = piece.failure or error


def _do(task: Task, piece: _Piece, turn: _Turn, arrived: Countdown) -> None:
    """Do a task that reads into a turn, which may still be being copied from."""
    try:
        if turn.uploaded:
            turn.uploaded.wait()
        if piece.failure is None:
            task()
    except BaseException as error:  # noqa: BLE001 - whoever asks for the piece raises it
        piece.failure = error
    arrived()


def _joined(places: Iterable[int]) -> list[tuple[int, int]]:
    """Join neighbouring ranges, given as first and last bytes in turn."""
    joined: list[tuple[int, int]] = []
    both = iter(places)
    for start, end in zip(both, both, strict=True):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        elif start < end:
            joined.append((start, end))
    return joined


def _spans(piece: _Piece) -> list[FileSpan]:
    try:
        return piece.transfer.recipe.operands.spans(piece.transfer.selection)
    except Exception as error:  # noqa: BLE001 - it may be expected only: whoever asks for the piece raises it
        piece.failure = error
        return []


def _transfer_of(recipe: Recipe, selection: Selection, device: torch.device, room: int) -> Transfer:
    """Choose what a piece takes with it: as little as the device can compute its values from.

    Args:
        recipe: how it is computed.
        selection: which elements.
        device: where.
        room: bytes that it may take.
    """
    operands = recipe.operands
    if isinstance(operands, PackedOperands) and operands.is_transferable(selection):
        transfer = PackedTransfer(recipe, selection)
        if transfer.size <= room:  # else its blocks are larger than a turn
            return transfer
    if isinstance(operands, LowRankOperands) and device_low_rank.is_transferable(operands, selection, device):
        return device_low_rank.LowRankTransfer(recipe, selection)
    return StoredTransfer(recipe, selection)


def _compute(out: torch.Tensor, piece: _Piece, memory: torch.Tensor, sums: torch.Tensor) -> None:
    """Enqueue the combining of a piece, and the sum that shows whether its values are finite."""
    with torch.no_grad():
        value = piece.transfer.combine(out, memory)
        if piece.is_checked:
            wide = torch.promote_types(value.dtype, torch.float32)  # the sum of fp16 values overflows soon
            sums[piece.number].copy_(value.sum(dtype=wide), non_blocking=True)
