"""The content of ``sweep.json``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from expo_serve.report import Alpha, PublicSource
from expo_serve.version import __version__

SCHEMA_VERSION: Literal[1] = 1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measured(_Part):
    """One measure at one alpha, over all prompts."""

    value: float | None
    """None where nothing could be measured."""
    low: float | None = None
    """Lower end of the 95% interval; None where there is none."""
    high: float | None = None
    n: int = 0
    """Prompts, texts or questions that it is over."""


class MeasureInfo(_Part):
    """What a measure is, for readers of the numbers."""

    label: str
    unit: str
    """For example ``tokens``, ``nats/token``, ``share``; empty for a number without a unit."""
    better: Literal["higher", "lower", ""]
    """Empty where neither is."""
    formula: str


class AlphaResult(_Part):
    """What was found at one alpha."""

    alpha: Alpha
    effective_alpha: float | None
    """Of the loaded weights; None where nothing changed."""
    reward: float | None
    """Mean of the first ``--reward``; None without one."""
    kl: float | None
    """KL from alpha 0 in nats per token."""
    feasible: bool
    infeasible_because: list[str]
    """One line each; empty if feasible."""
    measures: dict[str, Measured]
    """By the measure's name, ``reward`` and ``kl`` among them; per task ``capability:TASK``."""
    failures: int
    """Prompts, texts and questions that failed."""
    deployment_id: str
    """What ``/v1/expo`` of a server with this alpha says."""
    load_seconds: float
    generate_seconds: float | None


class Effect(_Part):
    """A difference from alpha 0 on the half of the prompts that the choice has not seen."""

    alpha: Alpha
    measure: str
    difference: float
    low: float
    """Ends of the two-sided 95% interval."""
    high: float
    n: int


class Decision(_Part):
    """What the rule chose, and why."""

    kind: Literal["alpha", "zero", "none"]
    """``alpha``: this alpha is shown to help; ``zero``: nothing is shown to help; ``none``: without a reward."""
    reason: str
    """One sentence."""
    feasible: list[Alpha]
    best: Alpha | None = None
    """The feasible alpha with the best reward on the selection half."""
    effect: Effect | None = None
    """Of the chosen alpha, or of ``best`` where alpha 0 is recommended."""
    chosen_share: dict[str, float] = {}
    """How often each alpha is chosen by the whole rule over bootstrap samples, by its canonical form."""
    alpha_low: Alpha | None = None
    """2.5th percentile of the alphas so chosen."""
    alpha_high: Alpha | None = None
    remarks: list[str] = []
    """What the data cannot show: one sentence each."""


class SampleScores(_Part):
    """One answer's scores; its text is in ``answers.jsonl``."""

    alpha: Alpha
    prompt: int
    finish_reason: str
    scores: dict[str, float]
    """By the name of the measure."""


class Timing(_Part):
    """Wall-clock seconds."""

    engine_starts: int
    start_seconds: float
    total_seconds: float


class SweepResult(_Part):
    """All that a sweep found."""

    schema_version: Literal[1] = SCHEMA_VERSION
    version: str = __version__
    status: Literal["complete", "interrupted"]
    recommendation: Alpha | None
    """The alpha to deploy; 0 where nothing is shown to help; None without a reward or when interrupted."""
    decision: Decision
    alphas: list[AlphaResult]
    """In rising order."""
    measures: dict[str, MeasureInfo]
    samples: list[SampleScores]
    prompts: list[str]
    """What was asked, by index: the last user message of each prompt."""
    sources: dict[str, PublicSource]
    """By operand: base, and aligned or delta."""
    settings: dict[str, Any]
    """What decides the numbers: the sampling, chat template, system prompt, seed, margins, rounding, files' digests."""
    deploy: dict[str, str]
    """``command`` and ``values``: how to serve the recommended alpha with expo-serve, and the chart's values (YAML)."""
    versions: dict[str, str]
    timing: Timing
    warnings: list[str] = []
