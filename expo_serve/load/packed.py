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
from expo_serve.load.blocks import Coded, DamagedError, Values, changed_values, decode, decompressed
from expo_serve.load.dtypes import TORCH_DTYPES, signed_bits
from expo_serve.load.operands import Memory
from expo_serve.load.reader import Reader
from expo_serve.load.selection import FileSpan, Selection
from expo_serve.plan.packed_format import SAME, SPARSE, TABLE_ENTRY, Table, checksum, read_table
from expo_serve.plan.tensor_deltas import PackedTensorDelta

_LOOPS: tuple[kernels.Loop, ...] = ("bf16.combine", "reading.fetch", "sparse.extrapolate")


class PackedOperands:
    """Reads base and decodes the aligned tensor from it.

    Base's bytes are compared with the checksums of those that the delta was made against, at every alpha: so blocks
    of it are read whole, also where a rank wants a part of each row.
    """

    def __init__(self, delta: PackedTensorDelta, reader: Reader, used: tuple[Operand, ...]) -> None:
        self._delta, self._reader, self._used = delta, reader, used
        self._tensor, self._base = delta.tensor, delta.base
        self._spans: list[tuple[int, int]] = self._tensor.spans(delta.block)
        self._known: Table | None = None
        self._lock = threading.Lock()
        self._uncounted = self._tensor.count(delta.block) * TABLE_ENTRY.size
        self._dtype = TORCH_DTYPES[self._tensor.dtype]
        self._base_dtype = TORCH_DTYPES[self._base.dtype] if self._base else self._dtype

    @property
    def grain(self) -> int:
        """Values in one block."""
        return self._delta.block

    @property
    def dtypes(self) -> Mapping[Operand, torch.dtype]:
        """Return the dtypes of base and of what the delta decodes to."""
        both: dict[Operand, torch.dtype] = {"base": self._base_dtype, "aligned": self._dtype}
        return {operand: both[operand] for operand in self._used}

    @property
    def widest(self) -> int:
        """Bytes of the wider of an element of base and one of aligned."""
        return max(self._dtype.itemsize, self._base_dtype.itemsize)

    def spans(self, selection: Selection) -> list[FileSpan]:
        """Return the packed bytes of the blocks that cover the selection, and what those need of base."""
        if not selection.is_contiguous or not selection.numel:
            return []
        blocks = self.blocks(selection)
        offsets = self._table().offsets
        packed = Selection.flat(offsets[blocks.start], offsets[blocks.stop] - offsets[blocks.start])
        wanted = [self._reader.span_of("delta", self._delta.record, packed)] if packed.numel else []
        if self._base and (shared := self._shared(blocks)).numel:
            wanted.append(self._reader.span_of("base", self._base, shared))
        return wanted

    def read_bytes(self, selection: Selection) -> Mapping[str, int]:
        """Count whole blocks of base and delta, and the table with the first call."""
        if not selection.numel:
            return {}
        with self._lock:
            table, self._uncounted = self._uncounted, 0
        blocks = self.blocks(selection)
        offsets = self._table().offsets
        base = self._shared(blocks).numel * self._base.itemsize if self._base else 0
        packed = offsets[blocks.stop] - offsets[blocks.start] if "aligned" in self._used else 0
        return {"base": base, "delta": table + packed}

    def read(self, selection: Selection, memory: Memory) -> dict[Operand, torch.Tensor]:
        """Decode the blocks that cover the selection."""
        values = {
            operand: memory(operand, selection.numel * dtype.itemsize).values(dtype, selection.shape)
            for operand, dtype in self.dtypes.items()
        }
        self._pick(selection, values)
        return values

    def _pick(self, selection: Selection, values: dict[Operand, torch.Tensor]) -> None:
        """Decode the blocks that cover the selection and copy its elements out; split large selections."""
        if (selection.end - selection.offset) * self.widest > sizes.PACKED_SPAN_BYTES and max(selection.shape) > 1:
            dim, halves = selection.halves()
            for start, length in halves:
                part = {operand: value.narrow(dim, start, length) for operand, value in values.items()}
                self._pick(selection.narrow(dim, start, length), part)
            return
        blocks = self.blocks(selection)
        start, end = self._spans[blocks.start][0], self._spans[blocks.stop - 1][1]
        shape = (end - start,)
        around: dict[Operand, torch.Tensor] = {
            "base": self._scratch("base", self._base_dtype, shape),
            "aligned": self._scratch("aligned", self._dtype, shape),
        }
        is_whole = selection.is_contiguous and selection.numel == end - start  # as most pieces are
        if is_whole:
            around |= {operand: value.view(-1) for operand, value in values.items()}
        for block in blocks:
            first, last = (place - start for place in self._spans[block])
            self._decode(block, around["base"][first:last], around["aligned"][first:last])
        if not is_whole:
            for operand, value in values.items():
                value.copy_(around[operand].as_strided(selection.shape, selection.stride, selection.offset - start))

    def fill_prefix(self, dest: torch.Tensor, selection: Selection, alpha: float, dither_key: int | None) -> int:
        """Read blocks of base straight into ``dest``, and extrapolate in place what the delta changes."""
        first, end = selection.offset, selection.end
        is_plain = self._dtype == self._base_dtype == torch.bfloat16 and len(self._used) == 2
        if not is_plain or end > self._tensor.values_in_base or not kernels.available(*_LOOPS):
            return 0
        flat, table, blocks = dest.detach().view(-1), self._table(), self.blocks(selection)
        if not {SAME, SPARSE}.issuperset(table.codings[blocks.start : blocks.stop]):
            return 0
        self._read_packed(table.offsets[blocks.start], table.offsets[blocks.stop])
        for block in blocks:
            start, stop = self._spans[block]
            low, high = max(start, first), min(stop, end)
            part = flat[low - first : high - first]
            is_whole = (low, high) == (start, stop)
            values = part if is_whole else self._scratch("aligned", self._dtype, (stop - start,))
            if not self._extrapolate(block, values, 1 + alpha, dither_key, table.offsets[blocks.start]):
                return low - first
            if not is_whole:
                part.copy_(values[low - start : high - start])
        return selection.numel

    def _extrapolate(
        self, block: int, values: torch.Tensor, weight: float, dither_key: int | None, read_from: int
    ) -> bool:
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
        factor, from_aligned = lerp_factor(weight)
        changes = parts.gaps, parts.small, parts.large, signed_bits(values)
        return extrapolate(*changes, factor, from_aligned, dither_key is not None, dither_key or 0, start)

    def _decode(self, block: int, base: torch.Tensor, aligned: torch.Tensor) -> None:
        """Read one block of base, and decode the same block of aligned."""
        start, _ = self._spans[block]
        coded = self._coded(block) if "aligned" in self._used else None
        is_shared = self._base is not None and start < self._tensor.values_in_base
        if is_shared:
            self.read_base(block, base)
        if coded is not None:
            self._decoded(block, coded, base.to(self._dtype) if is_shared else None, aligned)

    def _decoded(self, block: int, coded: Coded, base: torch.Tensor | None, out: torch.Tensor) -> None:
        try:
            decode(coded, None if base is None else signed_bits(base), out.numel(), signed_bits(out))
        except DamagedError as error:
            raise self._damaged(block, str(error)) from None

    def read_base(self, block: int, out: torch.Tensor) -> None:
        """Read a block of base, which must have the checksum of the base that the delta was made against."""
        assert self._base is not None
        start, end = self._spans[block]
        self._reader.read_onto(self._base, Selection.flat(start, end - start), out)
        if checksum(_raw(out)) != self._table().base[block]:
            raise ValuesError(
                f"base is not the one that the delta was made against ({self._delta.base_name}): tensor "
                f"{self._base.name!r} in {self._base.file} has other values (values {start} to {end}); give that base"
            )

    def _read_packed(self, start: int, end: int) -> Any:
        """Read bytes of the delta into this thread's buffer for them."""
        selection = Selection.flat(start, end - start)
        return self._reader.read(self._delta.record, selection, "packed").numpy()

    def _coded(self, block: int, read_from: int | None = None) -> Coded:
        """Return the checked bytes of a block.

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
        record = self._delta.record
        return CheckpointError(
            f"{record.file}: tensor {record.name!r}: block {block} is damaged ({why}); copy it again"
        )

    def _table(self) -> Table:
        if self._known:
            return self._known
        with self._lock:
            if self._known is None:
                record, tensor = self._delta.record, self._tensor
                size = tensor.count(self._delta.block) * TABLE_ENTRY.size
                raw = self._reader.read(record, Selection.flat(0, size), "packed").numpy().tobytes()
                self._known = read_table(raw, tensor, self._delta.block, record)
            return self._known

    def blocks(self, selection: Selection) -> range:
        """Return the blocks that cover a selection, which is not empty."""
        return range(self._block_of(selection.offset), self._block_of(selection.end - 1) + 1)

    def _block_of(self, place: int) -> int:
        size, shared = self._delta.block, int(self._tensor.values_in_base)
        return place // size if place < shared else -(-shared // size) + (place - shared) // size

    def ends(self, blocks: range) -> tuple[int, int]:
        """Return the first value of some blocks, and the one after their last."""
        return self._spans[blocks.start][0], self._spans[blocks.stop - 1][1]

    def is_transferable(self, selection: Selection) -> bool:
        """Return True if blocks can go to a device as they are: contiguous elements, and base of the same dtype."""
        is_plain = selection.is_contiguous and len(self._used) == 2 and self._dtype == self._base_dtype
        return is_plain and selection.end <= self._tensor.values_in_base

    def read_changes(
        self, block: int, base: torch.Tensor, out: torch.Tensor, most: int
    ) -> tuple[Values, Values] | None:
        """Read what changes in a block; where its coding holds all values, or too much changes, decode it.

        Args:
            block: which.
            base: base's values of it.
            out: where its values go if it is decoded: contiguous, on the CPU.
            most: changes that are wanted.

        Returns:
            The places of the changes in the block (int64), and the bits of the values there; None if it was decoded.

        Raises:
            CheckpointError: a file cannot be read, or the delta is damaged.
        """
        coded = self._coded(block)
        if coded.coding in (SAME, SPARSE):
            bits = signed_bits(base)
            try:
                found = changed_values(decompressed(coded, bits.size, bits.itemsize), bits)
            except DamagedError as error:
                raise self._damaged(block, str(error)) from None
            if len(found[0]) <= most:
                return found
        self._decoded(block, coded, base, out)
        return None

    def _shared(self, blocks: range) -> Selection:
        """Return the elements of base that these blocks need."""
        start, end = self._spans[blocks.start][0], self._spans[blocks.stop - 1][1]
        shared = self._tensor.values_in_base
        return Selection.flat(min(start, shared), max(0, min(end, shared) - start))

    def _scratch(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Return this thread's buffer of this name."""
        size = math.prod(shape) * dtype.itemsize
        return self._reader.buffer(f"packed-{name}", size).values(dtype, shape)


def _raw(values: torch.Tensor) -> Any:
    return values.view(torch.uint8).numpy()
