"""Packs the difference of a pair: block by block, with one thread per core and a few blocks in memory."""

from __future__ import annotations

from collections.abc import Iterator
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
from expo_serve.progress import Progress
from expo_serve.write.provenance import provenance

MAX_FILE_BYTES = 5 * 10**9
"""Bytes of the aligned checkpoint that one file of the delta decodes to; the file itself has a few percent of them."""
_NO_CHECKSUM = "0" * 16
"""Placeholder of a table's checksum until the table is written."""


@dataclass(frozen=True)
class _Block:
    """One block of values: the unit of work of a thread."""

    tensor: PackedTensor
    number: int
    start: int
    end: int


@dataclass(frozen=True)
class _Encoded:
    """An encoded block."""

    coded: Coded
    base: int
    """Checksum of the block's bytes in base; 0 without base."""


@dataclass
class _Written:
    """The part of one tensor that has been written: its table, then blocks up to ``end``."""

    tensor: PackedTensor
    offset: int
    table: Any
    """Array of :data:`~expo_serve.load.blocks.TABLE`, one entry per block."""
    end: int = 0

    def __post_init__(self) -> None:
        self.end = self.offset + self.table.nbytes


@dataclass
class _Layout:
    """The tensors of one file."""

    tensors: list[PackedTensor] = field(default_factory=list)
    nbytes: int = 0
    """Size of the tensors in the aligned checkpoint."""


def write_packed_delta(plan: Plan, folder: Path, progress: Progress) -> None:
    """Write the files of a packed delta; companion files are left to the caller.

    Args:
        plan: plan of the pair, with every tensor that the delta is to decode to.
        folder: existing folder.
        progress: counts bytes of the aligned checkpoint.

    Raises:
        CheckpointError: a source cannot be read.
        OSError: the folder cannot be written to.
    """
    layouts = _layouts(plan)
    source = plan.base.source
    base = {"name": source.name, "revision": source.revision, "made_from": provenance(plan, None)}
    reader = Reader()
    progress.watch(reader.activity)
    for number, layout in enumerate(layouts, 1):
        name = "delta" if len(layouts) == 1 else f"delta-{number:05}-of-{len(layouts):05}"
        tensors = {tensor.name: tensor for tensor in layout.tensors}
        sizes = {tensor.name: ("U8", (0,), 0) for tensor in layout.tensors}
        room = len(header_bytes(sizes, write_info(len(layouts), base, tensors), longest=True))
        with SafetensorsWriter(folder / f"{name}.safetensors", room) as writer:
            written = _write_tensors(plan, layout, reader, writer, progress)
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
    """Find base's tensor of the same name, dtype and shape: a tensor that is copied from aligned often equals it."""
    base = plan.base.tensors.get(aligned.name)
    return base if base and (base.dtype, base.shape) == (aligned.dtype, aligned.shape) else None


def _write_tensors(
    plan: Plan, layout: _Layout, reader: Reader, writer: SafetensorsWriter, progress: Progress
) -> list[_Written]:
    written: dict[str, _Written] = {}
    end = 0
    for tensor in layout.tensors:
        if not tensor.count(BLOCK):
            written[tensor.name] = _Written(replace(tensor, table=f"{checksum(b''):016x}"), 0, np.zeros(0, TABLE))

    def work(block: _Block) -> _Encoded:
        return _encode(block, plan, reader)

    for block, encoded in in_order(work, _blocks(layout)):
        if block.number == 0:
            table = np.zeros(block.tensor.count(BLOCK), TABLE)
            written[block.tensor.name] = _Written(block.tensor, end, table)
        one = written[block.tensor.name]
        _write_block(one, block, encoded, writer)
        end = one.end
        progress.advance((block.end - block.start) * plan.tensors[block.tensor.name].aligned.itemsize)
    # An empty tensor gets the offset that its place in the order implies: the format allows no holes.
    offset = 0
    for tensor in layout.tensors:
        one = written[tensor.name]
        if not one.table.nbytes:
            one.offset = one.end = offset
        offset = one.end
    return [written[tensor.name] for tensor in layout.tensors]


def _blocks(layout: _Layout) -> Iterator[_Block]:
    for tensor in layout.tensors:
        for number, (start, end) in enumerate(tensor.spans(BLOCK)):
            yield _Block(tensor, number, start, end)


def _write_block(one: _Written, block: _Block, encoded: _Encoded, writer: SafetensorsWriter) -> None:
    parts = encoded.coded.parts
    data = b"".join(parts)
    sizes = [len(part) for part in parts]
    one.table[block.number] = (encoded.base, checksum(data) if data else 0, encoded.coded.coding, sizes)
    writer.write(one.end, data)
    one.end += len(data)
    if block.number == len(one.table) - 1:
        raw = one.table.tobytes()
        one.tensor = replace(one.tensor, table=f"{checksum(raw):016x}")
        writer.write(one.offset, raw)


def _encode(block: _Block, plan: Plan, reader: Reader) -> _Encoded:
    aligned = plan.tensors[block.tensor.name].aligned
    elements = Selection.flat(block.start, block.end - block.start)
    values = reader.read(aligned, elements, "aligned")
    if block.tensor.base is None or block.start >= block.tensor.values_in_base:
        return _Encoded(encode(signed_bits(values), None), 0)
    base = reader.read(plan.base.tensors[block.tensor.base[0]], elements, "base")
    digest = checksum(base.view(torch.uint8).numpy().data)
    return _Encoded(encode(signed_bits(values), signed_bits(base.to(values.dtype))), digest)
