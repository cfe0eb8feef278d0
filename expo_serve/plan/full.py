"""A full delta: a safetensors checkpoint whose tensors are ``aligned - base``, as FastChat and others published them.

``theta = base + (1 + alpha) * delta``; a tensor that the delta does not have is base's at every alpha.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from expo_serve.checkpoint.folder import Checkpoint, open_files, refuse_quantised
from expo_serve.checkpoint.records import Operand, TensorRecord
from expo_serve.checkpoint.source import read_config
from expo_serve.config import ExpoConfig, Source
from expo_serve.errors import CheckpointError, PairError
from expo_serve.plan.names import is_leftover, is_output, may_tie_output, ties_embeddings
from expo_serve.plan.over_base import BaseChanges, base_names, plan_over_base
from expo_serve.plan.plan import Plan
from expo_serve.plan.refusals import refuse_architectures
from expo_serve.plan.tensor_deltas import FullTensorDelta

_PROBES = 8
"""Vectors that are looked at to tell a delta from a whole checkpoint."""
_VALUES = 256
_WHOLE = 2
"""A step is far smaller than half of what it changes."""


@dataclass(frozen=True)
class FullDelta:
    """A checked full delta."""

    source: Source
    config: dict[str, Any]
    """Its config.json; empty where it has none."""
    files: tuple[Path, ...]
    tensors: dict[str, TensorRecord]
    format: ClassVar[str] = "full"
    operand: ClassVar[Operand] = "delta"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(record.nbytes for record in self.tensors.values())

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """See :class:`~expo_serve.plan.delta.DeltaFormat`: it is what no other kind is."""
        return any(folder.glob("*.safetensors"))

    @classmethod
    def open(cls, source: Source) -> FullDelta:
        """See :class:`~expo_serve.plan.delta.DeltaFormat`."""
        folder = Path(source.path)
        config = read_config("delta", source) if (folder / "config.json").is_file() else {}
        refuse_quantised("delta", config, folder)
        opened = open_files("delta", source)
        return cls(opened.source, config, opened.files, opened.tensors)

    def plan(self, base: Checkpoint, config: ExpoConfig) -> Plan:
        """See :class:`~expo_serve.plan.delta.Delta`."""
        if self.config.get("architectures"):
            refuse_architectures(base, Checkpoint("delta", self.source, self.config, self.files, self.tensors))
        wanted = {name: record for name, record in self.tensors.items() if not is_leftover(record)}
        names = base_names(wanted, base)
        tied = {name for name, record in wanted.items() if _is_tied_output(record, names[name], base)}
        there = {name: record for name, record in wanted.items() if names[name] in base.tensors}
        strangers = {name: record for name, record in wanted.items() if name not in there and name not in tied}
        steps = {names[name]: FullTensorDelta(record, base.tensors[names[name]]) for name, record in there.items()}
        self._refuse_strangers(strangers, base, config)
        _refuse_shapes(self, steps)
        if tied and ties_embeddings(self.config) is False:
            raise PairError(
                f"the delta ({self.source.name}) has an output of its own ({min(tied)}, tie_word_embeddings "
                f"false), base "
                f"({base.source.name}) ties its output to the embedding; give the base that it was made from"
            )
        warnings = tuple(_warnings(self, base, steps))
        changes = BaseChanges(steps, strangers, ignored=tuple(sorted(tied)), warnings=warnings)
        return plan_over_base(self, base, config, changes)

    def _refuse_strangers(self, strangers: dict[str, TensorRecord], base: Checkpoint, config: ExpoConfig) -> None:
        if strangers and (config.unmatched == "refuse" or len(strangers) == len(self.tensors)):
            raise PairError(
                f"the delta ({self.source.name}) has {len(strangers)} tensors that base ({base.source.name}) "
                f"lacks, the "
                f"first {next(iter(strangers))}; give the base that it was made from"
                + ("" if len(strangers) == len(self.tensors) else ", or --unmatched copy to take them over"),
                [f"only in delta: {record.name} {list(record.shape)}" for record in strangers.values()],
            )


def _is_tied_output(record: TensorRecord, name: str, base: Checkpoint) -> bool:
    """Whether it is an output that is the embedding in base, and so changes with it."""
    return name not in base.tensors and is_output(record) and may_tie_output(base.config)


def _warnings(delta: FullDelta, base: Checkpoint, steps: Mapping[str, FullTensorDelta]) -> Iterator[str]:
    missing = [
        name
        for name, record in base.tensors.items()
        if record.is_float and name not in steps and not is_leftover(record)
    ]
    if missing:
        yield (
            f"the delta ({delta.source.name}) does not have {len(missing)} of base's {len(base.tensors)} tensors, "
            f"the first "
            f"{missing[0]}: they stay base's; is it complete?"
        )
    vectors = [change for change in steps.values() if _is_vector(change)][:_PROBES]
    sizes = [(_mean_size(change.record), _mean_size(change.base)) for change in vectors]
    if sizes and all(0 < base_size < _WHOLE * size for size, base_size in sizes):
        yield (
            f"the delta's norms are as large as base's ({vectors[0].record.name}): it looks like a whole "
            f"checkpoint, which "
            "--aligned takes"
        )


def _is_vector(change: FullTensorDelta) -> bool:
    return change.record.is_float and len(change.record.shape) == 1 and change.record.numel > 0


def _refuse_shapes(delta: FullDelta, steps: dict[str, FullTensorDelta]) -> None:
    wrong = [change for change in steps.values() if not change.fits]
    if wrong:
        raise PairError(
            f"the delta ({delta.source.name}) does not fit base: {len(wrong)} of {len(delta.tensors)} tensors "
            f"differ in "
            "shape or kind; give the base that it was made from",
            [
                f"{change.base.name}: base {change.base.dtype} {list(change.base.shape)}, "
                f"delta {change.record.dtype} {list(change.record.shape)}"
                for change in wrong
            ],
        )


def _mean_size(record: TensorRecord) -> float:
    """The mean absolute value of a floating tensor's first values.

    Raises:
        CheckpointError: the file cannot be read.
    """
    count, width = min(record.numel, _VALUES), record.itemsize
    try:
        with record.file.open("rb") as file:
            file.seek(record.offset)
            raw = file.read(count * width)
    except OSError as error:
        raise CheckpointError(f"{record.file}: cannot be read: {error.strerror}") from None
    if record.dtype == "BF16":  # the upper half of an fp32
        raw = b"".join(bytes(2) + raw[at : at + 2] for at in range(0, len(raw), 2))
        width = 4
    letter = {2: "e", 4: "f", 8: "d"}[width]
    values = struct.unpack(f"<{len(raw) // width}{letter}", raw)
    return float(sum(abs(value) for value in values)) / max(1, len(values))
