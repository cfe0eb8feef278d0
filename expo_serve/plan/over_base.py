"""A plan whose result is base with changes: for deltas that name tensors of base."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from expo_serve.checkpoint.folder import Checkpoint
from expo_serve.checkpoint.records import TensorRecord
from expo_serve.config import ExpoConfig, Source
from expo_serve.plan.matching import find_renaming
from expo_serve.plan.names import is_leftover
from expo_serve.plan.pair import check_rules
from expo_serve.plan.plan import OpenedSource, Plan, PlannedTensor
from expo_serve.plan.tensor_deltas import TensorDelta


@dataclass(frozen=True)
class BaseChanges:
    """What a delta does, by base's names."""

    steps: Mapping[str, TensorDelta]
    """Tensors that become ``base + (1 + alpha) * step``."""
    whole: Mapping[str, TensorRecord] = field(default_factory=dict)
    """Tensors that the delta holds as they are at alpha 0."""
    partners: Mapping[str, TensorRecord] = field(default_factory=dict)
    """Base's tensors for those of ``whole`` that base has under another name (a tied output)."""
    copies: Mapping[str, TensorRecord] = field(default_factory=dict)
    """Base's tensors that the result has once more, under these names."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def plan_over_base(
    delta: OpenedSource, base: Checkpoint, config: ExpoConfig, changes: BaseChanges, tokenizer: Source | None = None
) -> Plan:
    """Decide for every tensor of base, and for those that only the delta has.

    Raises:
        UsageError: an alpha rule that matches no tensor.
    """
    new = {name: record for name, record in changes.whole.items() if name not in base.tensors}
    check_rules(config, (*base.tensors, *new, *changes.copies))
    tensors = {name: _planned(record, config, changes) for name, record in base.tensors.items()}
    for name, record in new.items():
        partner = changes.partners.get(name)
        dtype = partner.dtype if partner else ""
        tensors[name] = PlannedTensor(replace(record, name=name), partner, config.alpha_for(name), "delta", None, dtype)
    for name, record in changes.copies.items():
        tensors[name] = PlannedTensor(replace(record, name=name), None, config.alpha_for(name), "base")
    return Plan(
        base,
        delta,
        base.source,
        tensors,
        copied_unmatched=tuple(name for name in new if name not in changes.partners),
        ignored_base=(),
        left_out=(),
        warnings=(*changes.warnings, *_warnings(tensors, changes)),
        unchanged=tuple(name for name, tensor in tensors.items() if tensor.origin == "base"),
        added=(*new, *changes.copies),
        overrides=dict(changes.overrides),
        tokenizer=tokenizer,
    )


def _planned(record: TensorRecord, config: ExpoConfig, changes: BaseChanges) -> PlannedTensor:
    alpha = config.alpha_for(record.name)
    can_change = record.is_float and not is_leftover(record)
    if can_change and (step := changes.steps.get(record.name)):
        return PlannedTensor(record, record, alpha, "delta", step)
    if can_change and (whole := changes.whole.get(record.name)):
        return PlannedTensor(replace(whole, name=record.name), record, alpha, "delta", None, record.dtype)
    return PlannedTensor(record, None, alpha, "base")


def _warnings(tensors: Mapping[str, PlannedTensor], changes: BaseChanges) -> list[str]:
    grown = {name: tensor.grown_rows for name, tensor in tensors.items() if tensor.grown_rows}
    warnings = []
    if grown:
        names = ", ".join(f"{name} (+{rows} rows)" for name, rows in grown.items())
        warnings.append(f"the delta has a larger vocabulary than base: new rows are taken over from it: {names}")
    if changes.ignored:
        warnings.append(f"{len(changes.ignored)} tensors of the delta are ignored, the first {changes.ignored[0]}")
    return warnings


def base_names(names: Collection[str], base: Checkpoint) -> dict[str, str]:
    """A delta's names of tensors to base's: the same, or with one prefix more or less.

    A name that base does not have at all stays as it is.
    """
    renaming = find_renaming(names, base.tensors)
    others = {name: renaming.apply(name) for name in names if name not in base.tensors}
    return {name: other if (other := others.get(name)) in base.tensors else name for name in names}
