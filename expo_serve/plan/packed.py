"""The packed delta, opened and planned: the result is that of the pair, bit for bit, at every alpha."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from expo_serve.checkpoint.folder import Checkpoint, open_files
from expo_serve.checkpoint.header import read_header
from expo_serve.checkpoint.records import FLOAT_DTYPES, Operand, TensorRecord
from expo_serve.checkpoint.source import read_config
from expo_serve.config import ExpoConfig, Source
from expo_serve.errors import CheckpointError, PairError
from expo_serve.plan.names import is_foreign_head
from expo_serve.plan.packed_format import VERSION_KEY, PackedTensor, read_info
from expo_serve.plan.pair import check_rules, value_head_warning
from expo_serve.plan.plan import Plan, PlannedTensor
from expo_serve.plan.refusals import refuse_architectures
from expo_serve.plan.tensor_deltas import PackedTensorDelta


@dataclass(frozen=True)
class PackedDelta:
    """A checked packed delta."""

    source: Source
    config: dict[str, Any]
    """The aligned checkpoint's config.json."""
    files: tuple[Path, ...]
    tensors: dict[str, TensorRecord]
    """The packed bytes, by the aligned tensors' names."""
    packed_tensors: dict[str, PackedTensor]
    """The metadata of each tensor."""
    block: int
    base_name: str
    """What it was made against."""
    format: ClassVar[str] = "packed"
    operand: ClassVar[Operand] = "delta"

    @property
    def nbytes(self) -> int:
        """Bytes of all that is packed."""
        return sum(record.nbytes for record in self.tensors.values())

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """See :class:`~expo_serve.plan.delta.DeltaFormat`."""
        return any(_says_packed(file) for file in sorted(folder.glob("*.safetensors"))[:1])

    @classmethod
    def open(cls, source: Source) -> PackedDelta:
        """See :class:`~expo_serve.plan.delta.DeltaFormat`."""
        opened = open_files("delta", source)
        config = read_config("delta", source)
        infos = []
        for file, metadata in opened.metadata.items():
            records = {name: record for name, record in opened.tensors.items() if record.file == file}
            infos.append(read_info(metadata, records, str(file)))
        if any(info.files != len(infos) or info.block != infos[0].block for info in infos):
            raise CheckpointError(
                f"delta: {source.path} holds {len(infos)} files of a packed delta of {infos[0].files}; copy all "
                f"of it again"
            )
        packed_tensors = {name: tensor for info in infos for name, tensor in info.tensors.items()}
        return cls(
            opened.source, config, opened.files, opened.tensors, packed_tensors, infos[0].block, infos[0].base_name
        )

    def plan(self, base: Checkpoint, config: ExpoConfig) -> Plan:
        """See :class:`~expo_serve.plan.delta.Delta`."""
        plan = self.plan_all(base, config)
        left_out = tuple(name for name in plan.tensors if is_foreign_head(name, self.config))
        tensors = {name: tensor for name, tensor in plan.tensors.items() if name not in left_out}
        warnings = (value_head_warning(left_out),) if left_out else ()
        return Plan(base, self, self.source, tensors, plan.copied_unmatched, plan.ignored_base, left_out, warnings)

    def plan_all(self, base: Checkpoint, config: ExpoConfig) -> Plan:
        """A plan with every tensor of the aligned checkpoint, also those that no model loads.

        Raises:
            PairError, UsageError: see :class:`~expo_serve.plan.delta.Delta`.
        """
        refuse_architectures(base, Checkpoint("delta", self.source, self.config, self.files, self.tensors))
        self._refuse_other_base(base)
        check_rules(config, self.tensors)
        tensors = {name: self._planned(name, base, config) for name in self.tensors}
        used = {tensor.base[0] for tensor in self.packed_tensors.values() if tensor.base}
        alone = (
            name for name, tensor in self.packed_tensors.items() if not tensor.base and tensor.dtype in FLOAT_DTYPES
        )
        ignored = tuple(name for name, record in base.tensors.items() if name not in used and record.is_float)
        return Plan(base, self, self.source, tensors, tuple(alone), ignored, (), ())

    def _planned(self, name: str, base: Checkpoint, config: ExpoConfig) -> PlannedTensor:
        tensor, record = self.packed_tensors[name], self.tensors[name]
        partner = base.tensors[tensor.base[0]] if tensor.base else None
        result = TensorRecord(name, record.file, record.offset, tensor.dtype, tensor.shape)
        delta = PackedTensorDelta(record, tensor, self.block, partner, self.base_name)
        extrapolated = partner if tensor.extrapolated else None
        return PlannedTensor(result, extrapolated, config.alpha_for(name), "delta", delta)

    def _refuse_other_base(self, base: Checkpoint) -> None:
        if wrong := list(self._differences(base)):
            raise PairError(
                f"{base.source.name} is not the base that {self.source.name} was made against ({self.base_name}): "
                f"{len(wrong)} of {len(self.tensors)} tensors differ, the first {wrong[0].split(':')[0]}; give "
                f"that base",
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
            elif (record.dtype, record.shape) != (dtype, shape):
                yield f"{name}: expected {dtype} {list(shape)}, found {record.dtype} {list(record.shape)}"


def _says_packed(file: Path) -> bool:
    try:
        return VERSION_KEY in read_header(file).metadata
    except CheckpointError:
        return False
