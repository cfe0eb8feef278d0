"""The packed delta, opened and planned. The result is that of the pair, bit for bit, at every alpha.

:mod:`expo_serve.plan.packed_format` describes the format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from expo_serve.checkpoint.folder import Checkpoint, open_files
from expo_serve.checkpoint.header import read_header
from expo_serve.checkpoint.records import FLOAT_DTYPES, JsonObject, Operand, TensorRecord, grows_into, total_bytes
from expo_serve.checkpoint.source import read_config
from expo_serve.config import ExpoConfig, Source
from expo_serve.errors import CheckpointError, PairError, count_of
from expo_serve.plan.names import is_foreign_head
from expo_serve.plan.packed_format import VERSION_KEY, PackedTensor, read_info
from expo_serve.plan.pair import alpha_warnings, value_head_warnings
from expo_serve.plan.plan import Plan, PlannedTensor
from expo_serve.plan.refusals import refuse_architectures, refuse_unused_rules
from expo_serve.plan.tensor_deltas import PackedTensorDelta


@dataclass(frozen=True)
class PackedDelta:
    """A checked packed delta."""

    source: Source
    config: JsonObject
    """The aligned checkpoint's config.json."""
    files: tuple[Path, ...]
    tensors: dict[str, TensorRecord]
    """The packed bytes, by the names of the aligned tensors."""
    packed_tensors: dict[str, PackedTensor]
    """The metadata of each tensor."""
    block: int
    """Number of values in a block."""
    base_name: str
    """Name of the base that the delta was made against."""
    format: ClassVar[str] = "packed"
    operand: ClassVar[Operand] = "delta"

    @property
    def nbytes(self) -> int:
        """Size of the packed bytes of all tensors."""
        return total_bytes(self.tensors.values())

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Return whether the folder's first safetensors file has the metadata of a packed delta."""
        return any(_is_packed(file) for file in sorted(folder.glob("*.safetensors"))[:1])

    @classmethod
    def open(cls, source: Source) -> PackedDelta:
        """Read and check the headers, the metadata and the config.

        Raises:
            CheckpointError: a file breaks the format, is damaged or is missing.
        """
        opened = open_files("delta", source)
        config = read_config("delta", source)
        infos = []
        for file, metadata in opened.metadata.items():
            records = {name: record for name, record in opened.tensors.items() if record.file == file}
            infos.append(read_info(metadata, records, str(file)))
        first = infos[0]
        if any(info.files != len(infos) or info.block != first.block for info in infos):
            raise CheckpointError(
                f"delta: {source.path} holds {count_of(len(infos), 'file')} of a packed delta of {first.files}; copy "
                "all of it again"
            )
        packed = {name: tensor for info in infos for name, tensor in info.tensors.items()}
        return cls(opened.source, config, opened.files, opened.tensors, packed, first.block, first.base_name)

    def plan(self, base: Checkpoint, config: ExpoConfig, keep_left_out: bool = False) -> Plan:
        """Decide for every tensor of the aligned checkpoint.

        Args:
            base: the base that the delta was made against.
            config: alpha and its rules.
            keep_left_out: plan the tensors that no model can load too, for a result that has to be complete.

        Raises:
            PairError: the delta was made against another base.
            UsageError: an alpha rule matches no tensor.
        """
        refuse_architectures(base, Checkpoint("delta", self.source, self.config, self.files, self.tensors))
        self._refuse_other_base(base)
        refuse_unused_rules(config, self.tensors)
        packed = self.packed_tensors
        used = {tensor.base[0] for tensor in packed.values() if tensor.base}
        left_out = () if keep_left_out else tuple(name for name in self.tensors if is_foreign_head(name, self.config))
        plan = Plan(
            base,
            self,
            model=self.source,
            tensors={name: self._planned(name, base, config) for name in self.tensors if name not in left_out},
            copied_unmatched=tuple(
                name for name, tensor in packed.items() if not tensor.base and tensor.dtype in FLOAT_DTYPES
            ),
            ignored_base=tuple(name for name, record in base.tensors.items() if name not in used and record.is_float),
            left_out=left_out,
        )
        return replace(plan, warnings=(*alpha_warnings(config), *value_head_warnings(left_out)))

    def _planned(self, name: str, base: Checkpoint, config: ExpoConfig) -> PlannedTensor:
        tensor, record = self.packed_tensors[name], self.tensors[name]
        partner = replace(base.tensors[tensor.base[0]], shape=tensor.base[2]) if tensor.base else None
        result = TensorRecord(name, record.file, record.offset, tensor.dtype, tensor.shape)
        delta = PackedTensorDelta(record, tensor, self.block, partner, self.base_name)
        extrapolated = partner if tensor.extrapolated else None
        alpha = config.alpha_for(name)
        return PlannedTensor(result, extrapolated, alpha, "delta", delta, rounding=config.how_to_round)

    def _refuse_other_base(self, base: Checkpoint) -> None:
        if wrong := list(self._differences(base)):
            raise PairError(
                f"{base.source.name} is not the base that {self.source.name} was made against ({self.base_name}): "
                f"dtype or shape differs in {len(wrong)} of {count_of(len(self.tensors), 'tensor')}, the first "
                f"{wrong[0].split(':')[0]}; give that base",
                wrong,
            )

    def _differences(self, base: Checkpoint) -> Iterator[str]:
        for tensor in self.packed_tensors.values():
            if tensor.base is None:
                continue
            name, dtype, shape = tensor.base
            record = base.tensors.get(name)
            if record is None:
                yield f"{name}: expected {dtype} {list(shape)}, base has no such tensor"
            elif record.dtype != dtype or not grows_into(shape, record.shape):  # rows that aligned lost are not used
                yield f"{name}: expected {dtype} {list(shape)}, found {record.dtype_and_shape}"


def _is_packed(file: Path) -> bool:
    try:
        return VERSION_KEY in read_header(file).metadata
    except CheckpointError:
        return False
