"""Base and aligned made comparable: for each tensor of the aligned side, what becomes of it.

All refusals but one (values that are not finite) happen here, from headers alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from expo_serve.checkpoint.folder import Checkpoint
from expo_serve.config import ExpoConfig
from expo_serve.errors import UsageError
from expo_serve.plan.matching import Matching, match
from expo_serve.plan.plan import Plan, PlannedTensor
from expo_serve.plan.refusals import refuse_architectures, refuse_tensors


def plan_pair(base: Checkpoint, aligned: Checkpoint, config: ExpoConfig) -> Plan:
    """Decide for every tensor, or refuse the pair.

    Raises:
        PairError: other architectures, shapes or tensors than a pair has; the first ten are named.
        UsageError: an alpha rule that matches no tensor.
    """
    refuse_architectures(base, aligned)
    matching = match(base, aligned)
    refuse_tensors(base, aligned, matching, config)
    check_rules(config, aligned.tensors)
    tensors = {
        name: PlannedTensor(aligned.tensors[name], partner, config.alpha_for(name))
        for name, partner in matching.partners.items()
    }
    ignored = tuple(record.name for record in matching.only_base.values())
    copied = (*matching.only_aligned, *(matching.spare if config.unmatched == "copy" else ()))
    plan = Plan(base, aligned, aligned.source, tensors, copied, ignored, matching.left_out, ())
    return replace(plan, warnings=tuple(_warnings(plan, matching)))


def check_rules(config: ExpoConfig, names: Iterable[str]) -> None:
    """Every alpha rule must match a tensor.

    Raises:
        UsageError: one matches none.
    """
    for rule in config.alpha_rules:
        if not any(rule.matches(name) for name in names):
            raise UsageError(f"alpha rule {rule.text!r} matches no tensor of the aligned checkpoint")


def _warnings(plan: Plan, matching: Matching) -> Iterable[str]:
    if grown := plan.grown:
        names = ", ".join(f"{name} (+{rows} rows)" for name, rows in grown.items())
        yield f"aligned has a larger vocabulary than base: new rows are taken over from aligned: {names}"
    if matching.spare:
        yield (
            f"only aligned has multi-token prediction layers ({len(matching.spare)} tensors): they are not "
            "extrapolated; the model itself does not load them"
        )
    if plan.left_out:
        yield value_head_warning(plan.left_out)
    if plan.copied_unmatched or plan.ignored_base:
        yield (
            f"--unmatched copy: {len(plan.copied_unmatched)} tensors that only aligned has are taken over, "
            f"{len(plan.ignored_base)} that only base has are ignored"
        )


def value_head_warning(names: tuple[str, ...]) -> str:
    """Says which tensors of a value head the result does not have."""
    return f"a value head is left out, since a model that generates text cannot load it: {', '.join(names)}"
