"""The sweep as a function, for Python programs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expo_serve import errors
from expo_serve.checkpoint.source import HubAccess
from expo_serve.config import parse_config
from expo_serve.plan.prepare import pin, prepare
from expo_serve.sweep.grid import parse_alphas
from expo_serve.sweep.results import SweepResult
from expo_serve.sweep.run import carry_out
from expo_serve.sweep.settings import SweepSettings


def sweep_alphas(
    sources: dict[str, Any],
    prompts: str | Path,
    out: str | Path,
    *,
    alphas: Sequence[float] | float | str | None = None,
    engine_arguments: Sequence[str] = (),
    hub: HubAccess | None = None,
    **settings: Any,
) -> SweepResult:
    """Measure alphas one after another in one engine, and recommend one: ``expo-serve sweep`` as a function.

    Warnings go to standard error, as do those of the command; vLLM's log is in the folder.

    Args:
        sources: keys of :class:`~expo_serve.ExpoConfig` but for alpha: ``base``, ``aligned`` or ``delta``, rules,
            rounding.
        prompts: a JSONL file with ``{"prompt": ...}`` or ``{"messages": [...]}`` a line.
        out: a folder that does not exist yet, unless ``resume=True``.
        alphas: numbers, ``"auto"``, or None for the default grid; alpha 0 is added.
        engine_arguments: flags of vLLM, as on the command line.
        hub: access to the hub.
        settings: fields of :class:`~expo_serve.sweep.settings.SweepSettings`: ``rewards``, ``n``, ``max_tokens``,
            ``temperature``, ``seed``, ``text``, ``refusals``, ``lm_eval``, ``kl_budget``, ``margin``,
            ``budget_seconds``, ``resume``, ...

    Raises:
        UsageError: an argument is wrong.
        ExpoError: as for the command; see :mod:`expo_serve.errors`.
    """
    config = parse_config({**sources, "alpha": 0.0}, "sources")
    plan = prepare(config, hub)
    for warning in plan.warnings:
        errors.warn(warning)
    for name in ("rewards", "lm_eval", "measures"):
        if isinstance(value := settings.get(name), str):
            settings[name] = (value,)
    for name in ("text", "refusals"):
        settings[name] = Path(settings[name]) if settings.get(name) is not None else None
    return carry_out(
        SweepSettings(
            config=pin(config, plan, time.monotonic()),
            prompts=Path(prompts),
            out=Path(out),
            alphas=parse_alphas(alphas),
            arguments=tuple(engine_arguments),
            **settings,
        )
    )
