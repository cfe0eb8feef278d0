"""The fast path of pairs and full deltas: blocks of bf16 values through one call of the compiled loop.

A call for every block would have Python between them, in threads that take turns at the GIL with the walk of the model:
where tensors are small that took more time than combining them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from expo_serve.kernels import reading
from expo_serve.load import sizes
from expo_serve.load.reader import Reader
from expo_serve.load.selection import FileSpan
from expo_serve.load.ways import Way


@dataclass(frozen=True, slots=True)
class Streamed:
    """One block: where its operands are, and how it is computed."""

    dest: torch.Tensor
    """bf16, on the CPU, contiguous."""
    base: FileSpan
    other: FileSpan
    index: int
    """The element of the tensor that the first value is."""
    factor: float
    from_other: bool
    is_delta: bool
    key: int | None
    """The tensor's key for dithered rounding; None rounds to nearest."""

    def record(self, base: int, other: int) -> tuple[object, ...]:
        """Return the fields of :data:`~expo_serve.kernels.reading.BLOCK`, with the addresses of mapped operands."""
        one, two = self.base, self.other
        return (
            one.descriptor, two.descriptor, one.offset, two.offset, base, other, self.dest.data_ptr(),
            self.dest.numel(), 0, self.index, self.key or 0, self.factor, self.from_other, self.is_delta,
            self.key is not None,
        )  # fmt: skip


def stream_all(blocks: Sequence[Streamed], reader: Reader, is_read_next: bool) -> list[int]:
    """Compute blocks, as far as the loop can.

    Args:
        blocks: at least one.
        reader: has their files open.
        is_read_next: whether the results should be in the cache afterwards.

    Returns:
        How many values of each block are done.
    """
    size = sum(block.dest.nbytes for block in blocks)
    way = reader.ways.choose(size)
    table = _mapped(blocks, reader) if way.is_mapped else None
    is_mapped, is_non_temporal = table is not None, way.is_non_temporal and not is_read_next
    if table is None:
        table = np.array([block.record(0, 0) for block in blocks], reading.BLOCK)
    one, two = (reader.buffer(operand, sizes.STREAM_PIECE_BYTES).array.ctypes.data for operand in ("base", "other"))
    piece = sizes.MAPPED_PIECE_BYTES if is_mapped else sizes.STREAM_PIECE_BYTES
    is_whole = True
    with (
        reader.activity.during(blocks[0].base.path, blocks[0].other.path),
        reader.ways.measured(Way(is_mapped, is_non_temporal), size),
    ):
        reading.stream(table, one, two, piece // 2, is_mapped, is_non_temporal)
        if is_mapped:
            is_whole = reader.release([part for block in blocks for part in (block.base, block.other)])
    done: list[int] = table["done"].tolist() if is_whole else [0] * len(blocks)
    reader.activity.add_bytes(4 * sum(done))
    return done


def _mapped(blocks: Sequence[Streamed], reader: Reader) -> reading.Blocks | None:
    """Return the records of blocks whose files are mapped; None where one cannot be."""
    records = []
    for block in blocks:
        base, other = reader.address_of(block.base), reader.address_of(block.other)
        if base is None or other is None:
            return None
        records.append(block.record(base, other))
    return np.array(records, reading.BLOCK)
