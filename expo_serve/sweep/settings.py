"""What a sweep is asked to do."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expo_serve.config import ExpoConfig, deployment_id
from expo_serve.errors import UsageError
from expo_serve.sweep.prompts import digest

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}
WINDOW_TOKENS = 512
"""Tokens of a window of held-out text, unless the model takes fewer."""


@dataclass(frozen=True)
class SweepSettings:
    """Everything but the sources, which the configuration names."""

    config: ExpoConfig
    """Pinned. Its alpha does not count."""
    prompts: Path
    out: Path
    alphas: tuple[float, ...] | None = None
    """Rising, 0 among them; None: found on the way (``auto``)."""
    n: int | None = None
    """Prompts drawn from the file; None for all."""
    rewards: tuple[str, ...] = ()
    lm_eval: tuple[str, ...] = ()
    measures: tuple[str, ...] | None = None
    """Names of the measures; None for all."""
    max_tokens: int = 256
    temperature: float = 0.7
    seed: int = 0
    system_prompt: str | None = None
    text: Path | None = None
    refusals: Path | None = None
    kl_budget: float | None = None
    """Nats per token."""
    margin: float = 0.02
    budget_seconds: float | None = None
    resume: bool = False
    arguments: tuple[str, ...] = ()
    """Flags of vLLM."""
    file_options: dict[str, Any] = field(default_factory=dict)
    """Keys of the ``--config`` file that are vLLM's."""

    def fixed(self) -> dict[str, Any]:
        """Return the settings that decide what is observed at an alpha: a resumed sweep must have the same."""
        pinned = self.config.pinned
        assert pinned is not None
        return {
            "deployment": deployment_id(self.config.model_copy(update={"alpha": 0.0}), pinned.deployed.path, None),
            "prompts": digest(self.prompts),
            "n": self.n,
            "max-tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "system-prompt": self.system_prompt,
            "text": digest(self.text),
            "refusals": digest(self.refusals),
            "lm-eval": list(self.lm_eval),
            "flags of vLLM": [*self.arguments, *(f"{key}={value}" for key, value in sorted(self.file_options.items()))],
        }

    def recorded(self) -> dict[str, Any]:
        """Return all settings, for ``sweep.json``."""
        return {
            **self.fixed(),
            "alphas": "auto" if self.alphas is None else list(self.alphas),
            "alpha-rule": [rule.text for rule in self.config.alpha_rules],
            "rounding": self.config.rounding,
            "rounding-seed": self.config.rounding_seed,
            "reward": list(self.rewards),
            "measure": "all" if self.measures is None else list(self.measures),
            "kl-budget": self.kl_budget,
            "margin": self.margin,
            "budget-seconds": self.budget_seconds,
        }


def parse_duration(text: str) -> float:
    """Read the value of ``--budget``, such as ``30m``; returns seconds.

    Raises:
        UsageError: it is not a duration.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if seconds <= 0:
        raise UsageError(f"--budget: expected a duration such as 30m, 90s or 2h, found {text!r:.50}")
    return seconds
