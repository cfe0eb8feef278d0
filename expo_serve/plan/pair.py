"""Plans a pair of checkpoints: decides for each tensor of the aligned checkpoint what becomes of it.

:mod:`expo_serve.plan.refusals` holds the checks that refuse a pair. Only values that are not finite are found later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from expo_serve.checkpoint.folder import Checkpoint
from expo_serve.checkpoint.records import TensorRecord, grows_into
from expo_serve.config import USUAL_ALPHA, ExpoConfig, format_alpha
from expo_serve.errors import count_of
from expo_serve.plan.doubts import same_sources
from expo_serve.plan.matching import Matching, match
from expo_serve.plan.names import config_differences, described, rope_of
from expo_serve.plan.plan import Plan, PlannedTensor
from expo_serve.plan.refusals import refuse_architectures, refuse_tensors, refuse_unused_rules

Partners = dict[str, TensorRecord | None]


def plan_pair(base: Checkpoint, aligned: Checkpoint, config: ExpoConfig, keep_left_out: bool = False) -> Plan:
    """Decide for every tensor, or refuse the pair.

    Args:
        base: the checkpoint before alignment.
        aligned: the checkpoint after alignment.
        config: alpha, its rules, and what to do with unmatched tensors.
        keep_left_out: plan the tensors that no model can load too, for a result that has to be complete.

    Raises:
        PairError: architectures, shapes or names of tensors differ as they do not in a pair.
        UsageError: an alpha rule matches no tensor.
    """
    refuse_architectures(base, aligned)
    matching = match(base, aligned)
    refuse_tensors(base, aligned, matching, config)
    refuse_unused_rules(config, aligned.tensors)
    partners = {**_as_long(matching.partners, aligned), **(dict.fromkeys(matching.left_out) if keep_left_out else {})}
    mtp_only = matching.mtp_only_in_aligned if config.unmatched == "copy" else ()
    plan = Plan(
        base,
        aligned,
        model=aligned.source,
        tensors={
            name: PlannedTensor(aligned.tensors[name], partner, config.alpha_for(name), rounding=config.how_to_round)
            for name, partner in partners.items()
        },
        copied_unmatched=(*matching.only_aligned, *mtp_only),
        ignored_base=tuple(record.name for record in matching.only_base.values()),
        left_out=() if keep_left_out else matching.left_out,
    )
    warnings = (*alpha_warnings(config), *_warnings(plan, matching, aligned))
    return replace(plan, warnings=warnings, doubts=tuple(same_sources(base, aligned)))


def _as_long(partners: Partners, aligned: Checkpoint) -> Partners:
    """Return the partners with no more rows than aligned has, which lost base's padding or last tokens."""
    return {
        name: replace(partner, shape=aligned.tensors[name].shape)
        if partner and partner.shape != (shape := aligned.tensors[name].shape) and grows_into(shape, partner.shape)
        else partner
        for name, partner in partners.items()
    }


def _warnings(plan: Plan, matching: Matching, aligned: Checkpoint) -> Iterable[str]:
    yield from vocabulary_warnings("aligned", plan.grown)
    if cut := {
        tensor.name: rows
        for tensor in plan.extrapolated
        if tensor.base and (rows := _rows(plan.base.tensors[tensor.base.name]) - _rows(tensor.base)) > 0
    }:
        names = ", ".join(f"{name} (-{count_of(rows, 'row')})" for name, rows in cut.items())
        yield f"aligned has a smaller vocabulary than base: base's last rows are not used: {names}"
    if matching.mtp_only_in_aligned:
        yield (
            f"only aligned has multi-token prediction layers ({count_of(len(matching.mtp_only_in_aligned), 'tensor')}):"
            " they are not extrapolated; the model itself does not load them"
        )
    if matching.towers:
        yield _tower_warning(plan, matching)
    yield from value_head_warnings(plan.left_out)
    yield from _config_warnings(plan.base, aligned)
    if plan.copied_unmatched or plan.ignored_base:
        yield (
            f"--unmatched copy: copied {count_of(len(plan.copied_unmatched), 'tensor')} that only aligned has, "
            f"ignored {count_of(len(plan.ignored_base), 'tensor')} that only base has"
        )


def _config_warnings(base: Checkpoint, aligned: Checkpoint) -> Iterable[str]:
    """Warn of settings that give the same weights another meaning; the result has those of aligned."""
    different = {
        **config_differences(base.config, aligned.config, ("hidden_act", "hidden_activation")),
        **_rope_differences(rope_of(base.config), rope_of(aligned.config)),
    }
    if different:
        yield (
            f"the configs differ in what the weights mean ({described(different)}): the result has aligned's "
            "settings, with which base's weights were not trained; are both configs right?"
        )


def _rope_differences(one: dict[str, object], two: dict[str, object]) -> dict[str, tuple[object, object]]:
    return {key: (value, two[key]) for key, value in one.items() if key in two and value != two[key]}


def _tower_warning(plan: Plan, matching: Matching) -> str:
    count = count_of(len(matching.towers), "tensor")
    if matching.towers[0] in plan.tensors:
        return f"base is aligned's language part alone: {count} outside of it are aligned's at every alpha"
    return f"aligned is base's language part alone: {count} of base outside of it are not used"


def _rows(record: TensorRecord) -> int:
    return record.shape[0] if record.shape else 0


def alpha_warnings(config: ExpoConfig) -> Iterable[str]:
    """Warn of an alpha that few pairs are meant for."""
    alphas = sorted({config.alpha, *(rule.alpha for rule in config.alpha_rules)}, key=abs)
    if abs(alphas[-1]) > USUAL_ALPHA:
        yield (
            f"alpha {format_alpha(alphas[-1])} is over {USUAL_ALPHA:.0f} in size: it is meant for pairs that are "
            "one or a few updates apart; with others the answers will be useless"
        )


def vocabulary_warnings(owner: str, grown: Mapping[str, int]) -> Iterable[str]:
    """Warn of a vocabulary that is larger than base's.

    Args:
        owner: the source that has the new rows, for the message.
        grown: tensor names to numbers of new rows; empty if there is nothing to warn of.
    """
    if grown:
        names = ", ".join(f"{name} (+{count_of(rows, 'row')})" for name, rows in grown.items())
        yield f"{owner} has a larger vocabulary than base: its new rows are copied: {names}"


def value_head_warnings(names: tuple[str, ...]) -> Iterable[str]:
    """Warn of the tensors of a value head that the result does not have; ``names`` may be empty."""
    if names:
        yield f"a value head is left out, because a model that generates text cannot load it: {', '.join(names)}"
