"""Making a packed delta out of a pair: block by block, in all cores' threads, with a few blocks in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expo_serve.checkpoint.records import TensorRecord
from expo_serve.checkpoint.writer import SafetensorsWriter, header_bytes
from expo_serve.load.blocks import TABLE, Coded, encode
from expo_serve.load.dtypes import signed_bits
from expo_serve.load.reader import Reader
from expo_serve.load.selection import Selection
from expo_serve.load.threads import in_order
from expo_serve.plan.packed_format import BLOCK, PackedTensor, checksum, write_info
from expo_serve.plan.plan import Plan

MAX_FILE_BYTES = 5 * 10**9
"""Of the aligned checkpoint, for each file: one takes some percent of it."""
_NO_CHECKSUM = "0" * 16


@dataclass(frozen=True)
class _Block:
    """A unit of work, and what comes of it."""

    tensor: PackedTensor
    number: int
    start: int
    end: int


@dataclass(frozen=True)
class _Done:
    coded: Coded
    base: int
    """The checksum of base's bytes."""


@dataclass
class _Written:
    """What has been written of one tensor."""

    tensor: PackedTensor
    offset: int
    table: Any
    end: int = 0

    def __post_init__(self) -> None:
        self.end = self.offset + self.table.nbytes


@dataclass
class _Layout:
    """What lies in one file."""

    tensors: list[PackedTensor] = field(default_factory=list)
    nbytes: int = 0


def pack(plan: Plan, folder: Path, advance: Callable[[int], None]) -> None:
    """Write the packed delta of a pair.

    Args:
        plan: of the pair, with every tensor that the aligned side is to have.
        folder: where to; what else belongs there is the caller's.
        advance: told of bytes of the aligned side that are done.

    Raises:
        CheckpointError: a side cannot be read.
        OSError: the folder cannot be written to.
    """
    layouts = _layouts(plan)
    base = {"name": plan.base.source.name, "revision": plan.base.source.revision}
    reader = Reader()
    for number, layout in enumerate(layouts, 1):
        name = "delta" if len(layouts) == 1 else f"delta-{number:05}-of-{len(layouts):05}"
        tensors = {tensor.name: tensor for tensor in layout.tensors}
        sizes = {tensor.name: ("U8", (0,), 0) for tensor in layout.tensors}
        room = len(header_bytes(sizes, write_info(len(layouts), base, tensors), longest=True))
        with SafetensorsWriter(folder / f"{name}.safetensors", room) as writer:
            written = _write_tensors(plan, layout, reader, writer, advance)
            final = {one.tensor.name: one.tensor for one in written}
            sizes = {one.tensor.name: ("U8", (size := one.end - one.offset,), size) for one in written}
            writer.finish(header_bytes(sizes, write_info(len(layouts), base, final)))


def _layouts(plan: Plan) -> list[_Layout]:
    layouts = [_Layout()]
    for tensor in plan.tensors.values():
        if layouts[-1].tensors and layouts[-1].nbytes + tensor.aligned.nbytes > MAX_FILE_BYTES:
            layouts.append(_Layout())
        predictor = tensor.base or _same_in_base(tensor.aligned, plan)
        base = (predictor.name, predictor.dtype, predictor.shape) if predictor else None
        aligned = tensor.aligned
        packed = PackedTensor(aligned.name, aligned.dtype, aligned.shape, base, tensor.base is not None, _NO_CHECKSUM)
        layouts[-1].tensors.append(packed)
        layouts[-1].nbytes += aligned.nbytes
    return layouts


def _same_in_base(aligned: TensorRecord, plan: Plan) -> TensorRecord | None:
    """Base's tensor of the same name and form, for what is taken over: most often it is the same."""
    base = plan.base.tensors.get(aligned.name)
    return base if base and (base.dtype, base.shape) == (aligned.dtype, aligned.shape) else None


def _write_tensors(
    plan: Plan, layout: _Layout, reader: Reader, writer: SafetensorsWriter, advance: Callable[[int], None]
) -> list[_Written]:
    written: dict[str, _Written] = {}
    end = 0
    for tensor in layout.tensors:
        if not tensor.count(BLOCK):
            written[tensor.name] = _Written(replace(tensor, table=f"{checksum(b''):016x}"), 0, np.zeros(0, TABLE))

    def work(block: _Block) -> _Done:
        return _encode(block, plan, reader)

    for block, done in in_order(work, _blocks(layout)):
        if block.number == 0:
            table = np.zeros(block.tensor.count(BLOCK), TABLE)
            written[block.tensor.name] = _Written(block.tensor, end, table)
        one = written[block.tensor.name]
        _write_block(one, block, done, writer)
        end = one.end
        advance((block.end - block.start) * _itemsize(plan.tensors[block.tensor.name].aligned))
    # Empty tensors lie where they come in the order, so that there are no holes.
    place = 0
    for tensor in layout.tensors:
        one = written[tensor.name]
        if not one.table.nbytes:
            one.offset = one.end = place
        place = one.end
    return [written[tensor.name] for tensor in layout.tensors]


def _blocks(layout: _Layout) -> Iterator[_Block]:
    for tensor in layout.tensors:
        for number, (start, end) in enumerate(tensor.spans(BLOCK)):
            yield _Block(tensor, number, start, end)


def _write_block(one: _Written, block: _Block, done: _Done, writer: SafetensorsWriter) -> None:
    parts = done.coded.parts
    data = b"".join(parts)
    sizes = [len(part) for part in parts]
    one.table[block.number] = (done.base, checksum(data) if data else 0, done.coded.coding, sizes)
    writer.write(one.end, data)
    one.end += len(data)
    if block.number == len(one.table) - 1:
        raw = one.table.tobytes()
        one.tensor = replace(one.tensor, table=f"{checksum(raw):016x}")
        writer.write(one.offset, raw)


def _encode(block: _Block, plan: Plan, reader: Reader) -> _Done:
    aligned = plan.tensors[block.tensor.name].aligned
    elements = Selection.flat(block.start, block.end - block.start)
    values = reader.read(aligned, elements, "aligned")
    if block.tensor.base is None or block.start >= block.tensor.shared:
        return _Done(encode(signed_bits(values), None), 0)
    base = reader.read(plan.base.tensors[block.tensor.base[0]], elements, "base")
    digest = checksum(base.view(torch.uint8).numpy())
    return _Done(encode(signed_bits(values), signed_bits(base.to(values.dtype))), digest)


def _itemsize(record: TensorRecord) -> int:
    return record.nbytes // max(1, record.numel)
