"""Plans a result that is base with changes: shared by the delta formats that name tensors of base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from expo_serve.checkpoint.folder import Checkpoint
from expo_serve.checkpoint.records import JsonObject, TensorRecord
from expo_serve.config import ExpoConfig, Source
from expo_serve.errors import count_of
from expo_serve.plan.doubts import same_sources
from expo_serve.plan.names import is_leftover
from expo_serve.plan.pair import alpha_warnings, vocabulary_warnings
from expo_serve.plan.plan import Doubt, OpenedSource, Plan, PlannedTensor
from expo_serve.plan.refusals import refuse_unused_rules
from expo_serve.plan.tensor_deltas import TensorDelta


@dataclass(frozen=True)
class BaseChanges:
    """What a delta changes in base. All keys are base's names."""

    deltas: Mapping[str, TensorDelta]
    """Tensors that become ``base + (1 + alpha) * delta``."""
    whole_tensors: Mapping[str, TensorRecord] = field(default_factory=dict)
    """Tensors that the delta stores as they are at alpha 0."""
    partners: Mapping[str, TensorRecord] = field(default_factory=dict)
    """Base's tensors to extrapolate from, for whole tensors that base has under another name (a tied output)."""
    copies: Mapping[str, TensorRecord] = field(default_factory=dict)
    """Base's tensors that the result has a second time, under these names."""
    overrides: JsonObject = field(default_factory=dict)
    """Keys of base's config that the result changes."""
    ignored: tuple[str, ...] = ()
    """Tensors of the delta that are not used."""
    warnings: tuple[str, ...] = ()
    doubts: tuple[Doubt, ...] = ()


def plan_over_base(
    delta: OpenedSource, base: Checkpoint, config: ExpoConfig, changes: BaseChanges, tokenizer: Source | None = None
) -> Plan:
    """Decide for every tensor of base, and for those that only the delta has.

    Args:
        delta: the opened delta.
        base: its base, whose config and names the result has.
        config: alpha and its rules.
        changes: what the delta changes.
        tokenizer: the source of the tokenizer, if it is not base.

    Raises:
        UsageError: an alpha rule matches no tensor.
    """
    new = {name: record for name, record in changes.whole_tensors.items() if name not in base.tensors}
    refuse_unused_rules(config, (*base.tensors, *new, *changes.copies))
    tensors = {name: _planned(record, config, changes) for name, record in base.tensors.items()}
    for name, record in new.items():
        partner = changes.partners.get(name)
        dtype = partner.dtype if partner else ""
        tensors[name] = PlannedTensor(
            replace(record, name=name), partner, config.alpha_for(name), "delta", None, dtype, config.how_to_round
        )
    for name, record in changes.copies.items():
        tensors[name] = PlannedTensor(replace(record, name=name), None, config.alpha_for(name), "base")
    plan = Plan(
        base,
        delta,
        model=base.source,
        tensors=tensors,
        copied_unmatched=tuple(name for name in new if name not in changes.partners),
        unchanged=tuple(name for name, tensor in tensors.items() if tensor.origin == "base"),
        added=(*new, *changes.copies),
        overrides=changes.overrides,
        tokenizer=tokenizer,
    )
    warnings = (*alpha_warnings(config), *changes.warnings, *_warnings(plan, changes))
    return replace(plan, warnings=warnings, doubts=(*same_sources(base, delta), *changes.doubts))


def _planned(record: TensorRecord, config: ExpoConfig, changes: BaseChanges) -> PlannedTensor:
    alpha, rounding = config.alpha_for(record.name), config.how_to_round
    can_change = record.is_float and not is_leftover(record)
    if can_change and (delta := changes.deltas.get(record.name)):
        return PlannedTensor(record, record, alpha, "delta", delta, rounding=rounding)
    if can_change and (whole := changes.whole_tensors.get(record.name)):
        return PlannedTensor(replace(whole, name=record.name), record, alpha, "delta", None, record.dtype, rounding)
    return PlannedTensor(record, None, alpha, "base")


def _warnings(plan: Plan, changes: BaseChanges) -> Iterator[str]:
    yield from vocabulary_warnings("the delta", plan.grown)
    if changes.ignored:
        ignored = count_of(len(changes.ignored), "tensor of the delta is", "tensors of the delta are")
        yield f"{ignored} ignored, the first {changes.ignored[0]}"
