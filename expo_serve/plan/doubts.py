"""Doubts: findings that most often mean a wrong model. Each refuses the load, unless the user allows it by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from expo_serve.config import ExpoConfig
from expo_serve.errors import PairError
from expo_serve.plan.plan import Doubt, OpenedSource, Plan


def unsettled(plan: Plan, config: ExpoConfig) -> list[PairError]:
    """Return an error for each doubt of a plan that the configuration does not allow."""
    return [
        PairError(f"{doubt.message} (if this is meant: --allow {doubt.name})")
        for doubt in plan.doubts
        if doubt.name not in config.allow
    ]


def settle(plan: Plan, config: ExpoConfig) -> Plan:
    """Return the plan with its doubts, all of them allowed, as warnings.

    Raises:
        PairError: a doubt is not allowed.
    """
    errors = unsettled(plan, config)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise PairError(
            f"the pair is doubtful for {len(errors)} reasons; see above", [error.message for error in errors]
        )
    allowed = tuple(f"{doubt.message} (allowed: {doubt.name})" for doubt in plan.doubts)
    return replace(plan, doubts=(), warnings=(*plan.warnings, *allowed))


def same_sources(base: OpenedSource, other: OpenedSource) -> Iterator[Doubt]:
    """Doubt two sides that are the same files: there is nothing to extrapolate."""
    if {file.resolve() for file in base.files} == {file.resolve() for file in other.files}:
        yield Doubt(
            "same-sources",
            f"base and {other.operand} are the same files ({base.source.name}), so every alpha gives the same model; "
            f"give the model before alignment as --base and the one after it as --{other.operand}",
        )
