"""A full delta: a safetensors checkpoint whose tensors are ``aligned - base``, as FastChat and others publish them.

The result is ``base + (1 + alpha) * delta``. A tensor that the delta does not have is base's at every alpha.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from expo_serve.checkpoint.folder import Checkpoint, open_files
from expo_serve.checkpoint.links import is_file
from expo_serve.checkpoint.quantisation import refuse_quantised
from expo_serve.checkpoint.records import JsonObject, Operand, TensorRecord, total_bytes
from expo_serve.checkpoint.source import read_config
from expo_serve.config import ExpoConfig, Source
from expo_serve.errors import PairError, count_of
from expo_serve.plan.matching import base_names, shared_targets
from expo_serve.plan.names import is_embedding, is_leftover, is_output, may_tie_output, ties_embeddings
from expo_serve.plan.over_base import BaseChanges, plan_over_base
from expo_serve.plan.plan import Doubt, Plan
from expo_serve.plan.refusals import refuse_architectures
from expo_serve.plan.samples import are_zero, mean_size
from expo_serve.plan.tensor_deltas import FullTensorDelta

_SAMPLED_VECTORS = 8
"""Vectors whose values are sampled to distinguish a delta from a whole checkpoint."""
_WHOLE_RATIO = 2
"""A real delta is far smaller than the tensor that it changes: less than half of its size."""


@dataclass(frozen=True)
class FullDelta:
    """A checked full delta."""

    source: Source
    config: JsonObject
    """The delta's config.json; empty if it has none."""
    files: tuple[Path, ...]
    tensors: dict[str, TensorRecord]
    format: ClassVar[str] = "full"
    operand: ClassVar[Operand] = "delta"

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return total_bytes(self.tensors.values())

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Return whether the folder holds safetensors files; the other formats are tried first."""
        return any(folder.glob("*.safetensors"))

    @classmethod
    def open(cls, source: Source) -> FullDelta:
        """Read and check the headers and the config, if there is one.

        Raises:
            CheckpointError: the delta is quantised, or a file breaks the format.
        """
        folder = Path(source.path)
        config = read_config("delta", source) if is_file(folder / "config.json") else {}
        refuse_quantised("delta", config, folder)
        opened = open_files("delta", source)
        return cls(opened.source, config, opened.files, opened.tensors)

    def plan(self, base: Checkpoint, config: ExpoConfig) -> Plan:
        """Decide for every tensor of base, and for those that only the delta has.

        Raises:
            PairError: the delta was made from another base.
            UsageError: an alpha rule matches no tensor.
        """
        if self.config.get("architectures"):
            refuse_architectures(base, Checkpoint("delta", self.source, self.config, self.files, self.tensors))
        wanted = {name: record for name, record in self.tensors.items() if not is_leftover(record)}
        names = base_names(wanted, base.tensors, base.config)
        in_base = {name: record for name, record in wanted.items() if names[name] in base.tensors}
        tied = {name for name, record in wanted.items() if name not in in_base and _is_tied_output(record, base)}
        extra = {name: record for name, record in wanted.items() if name not in in_base and name not in tied}
        deltas = {names[name]: FullTensorDelta(record, base.tensors[names[name]]) for name, record in in_base.items()}
        self._refuse_twice(names, base)
        self._refuse_extra(extra, base, config)
        self._refuse_shapes(deltas)
        self._refuse_untied_output(tied, base)
        changes = BaseChanges(
            deltas,
            extra,
            ignored=tuple(sorted(tied)),
            warnings=tuple(self._warnings(base, deltas)),
            doubts=tuple(self._doubts(deltas)),
        )
        return plan_over_base(self, base, config, changes)

    def _refuse_extra(self, extra: Mapping[str, TensorRecord], base: Checkpoint, config: ExpoConfig) -> None:
        if extra and (config.unmatched == "refuse" or len(extra) == len(self.tensors)):
            raise PairError(
                f"the delta ({self.source.name}) has {count_of(len(extra), 'tensor')} that base ({base.source.name}) "
                f"lacks, the first {next(iter(extra))}; give the base that the delta was made from"
                + ("" if len(extra) == len(self.tensors) else ", or --unmatched copy to copy them"),
                [f"only in delta: {record.name} {list(record.shape)}" for record in extra.values()],
            )

    def _refuse_twice(self, names: Mapping[str, str], base: Checkpoint) -> None:
        for target, group in shared_targets(names, base.tensors).items():
            raise PairError(
                f"the delta ({self.source.name}) changes {target} of base twice, as {' and '.join(group[:3])}; save "
                "each change once"
            )

    def _refuse_shapes(self, deltas: Mapping[str, FullTensorDelta]) -> None:
        wrong = [delta for delta in deltas.values() if not delta.fits]
        if wrong:
            advice = "; give the base that the delta was made from"
            if all(_has_new_rows(delta) for delta in wrong):
                rows = f"{wrong[0].base.name}: {wrong[0].record.shape[0]} rows, base {wrong[0].base.shape[0]}"
                advice = (
                    f": it has more tokens ({rows}), so base was resized before the delta was made, and what its new "
                    "rows held is not known; apply the delta with the tool that made it, and give the result as "
                    "--aligned"
                )
            raise PairError(
                f"the delta ({self.source.name}) does not fit base: shape or kind differs in {len(wrong)} of "
                f"{count_of(len(self.tensors), 'tensor')}{advice}",
                [
                    f"{delta.base.name}: base {delta.base.dtype_and_shape}, delta {delta.record.dtype_and_shape}"
                    for delta in wrong
                ],
            )

    def _refuse_untied_output(self, tied: set[str], base: Checkpoint) -> None:
        if tied and ties_embeddings(self.config) is False:
            raise PairError(
                f"the delta ({self.source.name}) has an output of its own ({min(tied)}, tie_word_embeddings false), "
                f"but base ({base.source.name}) ties its output to the embedding; give the base that the delta was "
                "made from"
            )

    def _warnings(self, base: Checkpoint, deltas: Mapping[str, FullTensorDelta]) -> Iterator[str]:
        missing = [
            name
            for name, record in base.tensors.items()
            if record.is_float and name not in deltas and not is_leftover(record)
        ]
        if missing:
            stay = "it stays" if len(missing) == 1 else "they stay"
            yield (
                f"the delta ({self.source.name}) lacks {len(missing)} of base's {count_of(len(base.tensors), 'tensor')}"
                f", the first {missing[0]}: {stay} base's; is the delta complete?"
            )
        if deltas and are_zero(delta.record for delta in deltas.values() if delta.record.is_float):
            yield (
                f"the first values of every tensor of the delta ({self.source.name}) are 0, so every alpha gives base; "
                "was it made from two different models?"
            )

    def _doubts(self, deltas: Mapping[str, FullTensorDelta]) -> Iterator[Doubt]:
        vectors = [delta for delta in deltas.values() if _is_vector(delta.record)][:_SAMPLED_VECTORS]
        sizes = [(mean_size(delta.record), mean_size(delta.base)) for delta in vectors]
        if sizes and all(0 < base_size < _WHOLE_RATIO * size for size, base_size in sizes):
            yield Doubt(
                "whole-checkpoint",
                f"the delta ({self.source.name}) looks like a whole checkpoint: its vectors are as large as base's "
                f"({vectors[0].record.name}); give it as --aligned",
            )


def _has_new_rows(delta: FullTensorDelta) -> bool:
    """Return whether a delta has more rows of a vocabulary than base has."""
    ends = is_embedding(delta.base) or is_output(delta.base)
    return ends and delta.record.is_float and delta.base.is_float and delta.base.grows_into(delta.record)


def _is_tied_output(record: TensorRecord, base: Checkpoint) -> bool:
    """Return whether a tensor that base lacks is an output that base ties to its embedding, and so changes with it."""
    return is_output(record) and may_tie_output(base.config)


def _is_vector(record: TensorRecord) -> bool:
    return record.is_float and len(record.shape) == 1 and record.numel > 0
