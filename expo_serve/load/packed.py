"""Reads a packed tensor: whole blocks of base are read and checked, the blocks of aligned are decoded from them."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any

import torch

from expo_serve import kernels
from expo_serve.checkpoint.records import Operand
from expo_serve.errors import CheckpointError, ValuesError
from expo_serve.load import sizes
from expo_serve.load.blocks import Coded, DamagedError, decode, decompressed
from expo_serve.load.dtypes import TORCH_DTYPES, signed_bits
from expo_serve.load.operands import Memory
from expo_serve.load.reader import Reader
from expo_serve.load.selection import FileSpan, Selection
from expo_serve.plan.packed_format import SAME, SPARSE, TABLE_ENTRY, Table, checksum, read_table
from expo_serve.plan.tensor_deltas import PackedTensorDelta

_SPAN_BYTES = 8 << 20
"""Decoded at a time where elements lie apart: what lies between them is decoded too."""

_LOOPS: tuple[kernels.Loop, ...] = ("bf16.combine", "reading.fetch", "sparse.extrapolate")


class PackedOperands:
    """Base and the decoded aligned tensor. See :class:`~expo_serve.load.operands.Operands`.

    Base's bytes are compared with the checksums of those that the delta was made against, at every alpha: so blocks
    of it are read whole, also where a rank wants a part of each row.
    """

    def __init__(self, change: PackedTensorDelta, reader: Reader, used: tuple[Operand, ...]) -> None:
        self._change, self._reader, self._used = change, reader, used
        self._tensor, self._base = change.tensor, change.base
        self._spans: list[tuple[int, int]] = self._tensor.spans(change.block)
        self._known: Table | None = None
        self._lock = threading.Lock()
        self._uncounted = self._tensor.count(change.block) * TABLE_ENTRY.size
        self._dtype = TORCH_DTYPES[self._tensor.dtype]
        self._base_dtype = TORCH_DTYPES[self._base.dtype] if self._base else self._dtype

    @property
    def grain(self) -> int:
        """A block."""
        return self._change.block

    @property
    def widest(self) -> int:
        """Bytes of an element of base or aligned."""
        return max(self._dtype.itemsize, self._base_dtype.itemsize)

    def spans(self, elements: Selection) -> list[FileSpan]:
        """See :class:`~expo_serve.load.operands.Operands`."""
        if not elements.is_contiguous or not elements.numel:
            return []
        blocks = self._blocks(elements)
        offsets = self._table().offsets
        packed = Selection.flat(offsets[blocks.start], offsets[blocks.stop] - offsets[blocks.start])
        wanted = [self._reader.span_of("delta", self._change.record, packed)] if packed.numel else []
        if self._base and (shared := self._shared(blocks)).numel:
            wanted.append(self._reader.span_of("base", self._base, shared))
        return wanted

    def read_bytes(self, elements: Selection) -> Mapping[str, int]:
        """Whole blocks of both; and the table, once."""
        if not elements.numel:
            return {}
        with self._lock:
            table, self._uncounted = self._uncounted, 0
        blocks = self._blocks(elements)
        offsets = self._table().offsets
        base = self._shared(blocks).numel * self._base.itemsize if self._base else 0
        packed = offsets[blocks.stop] - offsets[blocks.start] if "aligned" in self._used else 0
        return {"base": base, "delta": table + packed}

    def read(self, elements: Selection, memory: Memory) -> dict[Operand, torch.Tensor]:
        """See :class:`~expo_serve.load.operands.Operands`."""
        dtypes: dict[Operand, torch.dtype] = {"base": self._base_dtype, "aligned": self._dtype}
        values = {
            side: memory(side, elements.numel * dtypes[side].itemsize).values(dtypes[side], elements.shape)
            for side in self._used
        }
        self._pick(elements, values)
        return values

    def _pick(self, elements: Selection, values: dict[Operand, torch.Tensor]) -> None:
        """Decode what lies around elements and take them out of it, in parts where that would be much."""
        if (elements.end - elements.offset) * self.widest > _SPAN_BYTES and max(elements.shape) > 1:
            dim = elements.outer_dim
            half = elements.shape[dim] // 2
            for start, length in ((0, half), (half, elements.shape[dim] - half)):
                part = {side: value.narrow(dim, start, length) for side, value in values.items()}
                self._pick(elements.narrow(dim, start, length), part)
            return
        blocks = self._blocks(elements)
        start, end = self._spans[blocks.start][0], self._spans[blocks.stop - 1][1]
        shape = (end - start,)
        around: dict[Operand, torch.Tensor] = {
            "base": self._scratch("base", self._base_dtype, shape),
            "aligned": self._scratch("aligned", self._dtype, shape),
        }
        for block in blocks:
            first, last = (place - start for place in self._spans[block])
            self._decode(block, around["base"][first:last], around["aligned"][first:last])
        for side, value in values.items():
            value.copy_(around[side].as_strided(elements.shape, elements.stride, elements.offset - start))

    def fill_prefix(self, dest: torch.Tensor, elements: Selection, alpha: float) -> int:
        """Read blocks of base to where they belong, and extrapolate there what the delta changes."""
        first, end = elements.offset, elements.end
        is_plain = self._dtype == self._base_dtype == torch.bfloat16 and len(self._used) == 2
        if not is_plain or end > self._tensor.values_in_base or not kernels.available(*_LOOPS):
            return 0
        flat, table, blocks = dest.detach().view(-1), self._table(), self._blocks(elements)
        if not {SAME, SPARSE}.issuperset(table.codings[blocks.start : blocks.stop]):
            return 0
        self._read_packed(table.offsets[blocks.start], table.offsets[blocks.stop])
        for block in blocks:
            start, stop = self._spans[block]
            low, high = max(start, first), min(stop, end)
            part = flat[low - first : high - first]
            is_whole = (low, high) == (start, stop)
            values = part if is_whole else self._scratch("aligned", self._dtype, (stop - start,))
            if not self._extrapolate(block, values, 1 + alpha, table.offsets[blocks.start]):
                return low - first
            if not is_whole:
                part.copy_(values[low - start : high - start])
        return elements.numel

    def _extrapolate(self, block: int, values: torch.Tensor, weight: float, read_from: int) -> bool:
        """Compute the result of one block; return False for what :meth:`read` has to do."""
        from expo_serve.kernels.bf16 import lerp_factor
        from expo_serve.kernels.reading import fetch
        from expo_serve.kernels.sparse import extrapolate

        assert self._base is not None
        try:
            parts = decompressed(self._coded(block, read_from), values.numel(), 2)
        except DamagedError as error:
            raise self._damaged(block, str(error)) from None
        start, end = self._spans[block]
        there = self._reader.span_of("base", self._base, Selection.flat(start, end - start))
        expected = self._table().base[block]
        with self._reader.activity.during(there.path):
            if not fetch(there.descriptor, there.offset, _raw(values), sizes.FETCH_PIECE_BYTES, expected):
                return False
        self._reader.activity.add_bytes(values.nbytes)
        return extrapolate(parts.gaps, parts.small, parts.large, signed_bits(values), *lerp_factor(weight))

    def _decode(self, block: int, base: torch.Tensor, aligned: torch.Tensor) -> None:
        """One block of both sides."""
        start, _ = self._spans[block]
        coded = self._coded(block) if "aligned" in self._used else None
        is_shared = self._base is not None and start < self._tensor.values_in_base
        if is_shared:
            self._read_base(block, base)
        if coded is not None:
            self._decoded(block, coded, base.to(self._dtype) if is_shared else None, aligned)

    def _decoded(self, block: int, coded: Coded, base: torch.Tensor | None, out: torch.Tensor) -> None:
        try:
            decode(coded, None if base is None else signed_bits(base), out.numel(), signed_bits(out))
        except DamagedError as error:
            raise self._damaged(block, str(error)) from None

    def _read_base(self, block: int, out: torch.Tensor) -> None:
        """A block of base, which must be what the delta was made against."""
        assert self._base is not None
        start, end = self._spans[block]
        self._reader.read_onto(self._base, Selection.flat(start, end - start), out)
        if checksum(_raw(out)) != self._table().base[block]:
            raise ValuesError(
                f"base is not the one that the delta was made against ({self._change.base_name}): tensor "
                f"{self._base.name!r} in {self._base.file} has other values (values {start} to {end}); give that base"
            )

    def _read_packed(self, start: int, end: int) -> Any:
        """Bytes of the delta, in this thread's memory for them."""
        elements = Selection.flat(start, end - start)
        return self._reader.read(self._change.record, elements, "packed").numpy()

    def _coded(self, block: int, read_from: int | None = None) -> Coded:
        """A block's bytes, checked.

        Args:
            block: which.
            read_from: where the bytes begin that this thread has read; by default they are read now.
        """
        table = self._table()
        start, end = table.offsets[block], table.offsets[block + 1]
        if start == end:
            return Coded(table.codings[block])
        if read_from is None:
            read_from = start
            self._read_packed(start, end)
        view = self._reader.buffer("packed", end - read_from).bytes[start - read_from : end - read_from]
        if checksum(view) != table.packed[block]:
            raise self._damaged(block, "wrong checksum")
        one, two, _ = table.parts[block]
        return Coded(table.codings[block], (view[:one], view[one : one + two], view[one + two :]))

    def _damaged(self, block: int, why: str) -> CheckpointError:
        record = self._change.record
        return CheckpointError(
            f"{record.file}: tensor {record.name!r}: block {block} is damaged ({why}); copy it again"
        )

    def _table(self) -> Table:
        if self._known:
            return self._known
        with self._lock:
            if self._known is None:
                record, tensor = self._change.record, self._tensor
                size = tensor.count(self._change.block) * TABLE_ENTRY.size
                raw = self._reader.read(record, Selection.flat(0, size), "packed").numpy().tobytes()
                self._known = read_table(raw, tensor, self._change.block, record)
            return self._known

    def _blocks(self, elements: Selection) -> range:
        """Those that hold elements, of which there are some."""
        return range(self._block_of(elements.offset), self._block_of(elements.end - 1) + 1)

    def _block_of(self, place: int) -> int:
        size, shared = self._change.block, int(self._tensor.values_in_base)
        return place // size if place < shared else -(-shared // size) + (place - shared) // size

    def _shared(self, blocks: range) -> Selection:
        """What of base these blocks need."""
        start, end = self._spans[blocks.start][0], self._spans[blocks.stop - 1][1]
        shared = self._tensor.values_in_base
        return Selection.flat(min(start, shared), max(0, min(end, shared) - start))

    def _scratch(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """This thread's memory of a name."""
        size = math.prod(shape) * dtype.itemsize
        return self._reader.buffer(f"packed-{name}", size).values(dtype, shape)


def _raw(values: torch.Tensor) -> Any:
    return values.view(torch.uint8).numpy()
