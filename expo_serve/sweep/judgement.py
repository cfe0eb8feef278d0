"""Judges what a sweep has observed: all measures at all alphas, and the recommendation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from expo_serve.config import format_alpha
from expo_serve.errors import UsageError
from expo_serve.sweep import verdict
from expo_serve.sweep.feasibility import PROMPTS, Answered, Constraint, NoCollapse, NotInferior, WithinBudget
from expo_serve.sweep.measures.answers import lengths, repetition, unfinished
from expo_serve.sweep.measures.measure import Series, measured
from expo_serve.sweep.measures.models import kl_sums
from expo_serve.sweep.measures.registry import REGISTRY, measure_all
from expo_serve.sweep.observations import Observation
from expo_serve.sweep.observed import Observed
from expo_serve.sweep.results import AlphaResult, Decision, Measured, MeasureInfo, SampleScores
from expo_serve.sweep.rule import Evidence, apply_rule, choose_again, split
from expo_serve.sweep.statistics import Estimate

_MISSED = 0.1
"""Share of alpha by which the effective one may differ without a remark."""


@dataclass(frozen=True)
class RuleSettings:
    """What the rule depends on beside the observations.

    Raises:
        UsageError: a measure is not known.
    """

    margin: float = 0.02
    """Loss of a capability that is too much."""
    collapse_margin: float = 0.05
    """Rise of the share of unfinished answers, or of repeated 4-grams, that is allowed."""
    kl_budget: float | None = None
    """Nats per token."""
    seed: int = 0
    """Of the split into halves and of the bootstrap."""
    resamples: int = 2000
    """Of the bootstrap; 0 for none."""
    measures: tuple[str, ...] | None = None
    """Names of the measures to report; None for all. The rule looks at what it needs, whatever is reported."""
    rewards: tuple[str, ...] = ()
    """Specifications of the rewards; the rule maximises the first."""

    def __post_init__(self) -> None:
        for name in self.measures or ():
            if name not in REGISTRY:
                raise UsageError(f"--measure: expected one of {', '.join(REGISTRY)}; found {name!r:.50}")


@dataclass(frozen=True)
class Judgement:
    """What observations come to."""

    alphas: list[AlphaResult]
    """Rising; only alphas that were observed to their end."""
    decision: Decision
    measures: dict[str, MeasureInfo]
    samples: list[SampleScores]
    recommendation: float | None
    """0 where no other alpha is shown to help; None without a reward."""
    gains: dict[float, Measured]
    """What the rule maximises, on the selection half; empty without a reward. For the search of further alphas, which
    must not look at the other half."""


def judge(observations: Iterable[Observation], settings: RuleSettings) -> Judgement:
    """Measure every alpha that was observed to its end, and decide.

    Args:
        observations: in the order in which they were made.
        settings: margins, rewards, seed.

    Raises:
        ExpoError: alpha 0 is not among the alphas.
    """
    observed = Observed(observations)
    evidence = gather(observed, settings)
    decision, gains = _decide(evidence, settings)
    decision = decision.model_copy(update={"remarks": [*decision.remarks, *_rounding(observed)]})
    series = list(measure_all(observed, settings.rewards, _names(settings, decision)))
    return Judgement(
        alphas=list(_results(observed, evidence, series)),
        decision=decision,
        measures={one.name: one.info for one in series},
        samples=list(_samples(observed, series)),
        recommendation=_recommended(decision),
        gains=gains,
    )


def gather(observed: Observed, settings: RuleSettings) -> Evidence:
    """Return what the rule looks at."""
    reward = observed.rewards(settings.rewards[0]) if settings.rewards else {}
    return Evidence(
        alphas=observed.alphas,
        rewards=observed.of_answers(reward),
        lengths=observed.of_answers(lengths(observed)),
        constraints=tuple(_constraints(observed, settings)),
    )


def _constraints(observed: Observed, settings: RuleSettings) -> Iterator[Constraint]:
    zero, margin = observed.zero, settings.collapse_margin
    cut, repeated = (observed.of_answers(cells) for cells in (unfinished(observed), repetition(observed)))
    yield Answered(PROMPTS, cut, zero)
    yield NoCollapse(PROMPTS, cut, zero, "unfinished answers", margin)
    yield NoCollapse(PROMPTS, repeated, zero, "repeated 4-grams", margin)
    for task in sorted(observed.questions):
        yield NotInferior(task, observed.of_task(task), zero, settings.margin)
    if settings.kl_budget is not None:
        sums, tokens = map(observed.of_answers, kl_sums(observed))
        yield WithinBudget(PROMPTS, sums, zero, tokens, settings.kl_budget)


def _decide(evidence: Evidence, settings: RuleSettings) -> tuple[Decision, dict[float, Measured]]:
    """Return the decision, and the gains on the selection half."""
    if not len(evidence.scored):
        feasible = evidence.feasible()[0]
        return verdict.without_reward(evidence, feasible, is_given=bool(settings.rewards)), {}
    selection, unseen = split(evidence, settings.seed)
    outcome = apply_rule(evidence, selection, unseen)
    again = choose_again(evidence, settings.seed, settings.resamples)
    gains = dict(zip(evidence.alphas, _measured(outcome.gain, evidence.pairs(selection)), strict=True))
    return verdict.decision(evidence, outcome, evidence.pairs(unseen)[outcome.tested[0]], again), gains


def _measured(estimate: Estimate, pairs: Sequence[int]) -> list[Measured]:
    rows = zip(estimate.value[0], estimate.low()[0], estimate.high()[0], pairs, strict=True)
    return [measured(value, low, high, count) for value, low, high, count in rows]


def _recommended(decision: Decision) -> float | None:
    if decision.kind == "none":
        return None
    if decision.kind == "zero":
        return 0.0
    assert decision.effect is not None
    return decision.effect.alpha


def _names(settings: RuleSettings, decision: Decision) -> tuple[str, ...] | None:
    """Return which measures to report; the one that the decision names is always among them."""
    if settings.measures is None or decision.effect is None:
        return settings.measures
    return (*settings.measures, decision.effect.measure)


def _results(observed: Observed, evidence: Evidence, series: Sequence[Series]) -> Iterator[AlphaResult]:
    broken = [constraint.broken()[0] for constraint in evidence.constraints]
    for at, alpha in enumerate(observed.alphas):
        reasons = [one.reason(at) for one, breaks in zip(evidence.constraints, broken, strict=True) if breaks[at]]
        measures = {one.name: one.by_alpha[alpha] for one in series if alpha in one.by_alpha}
        loaded = observed.loaded[alpha]
        yield AlphaResult(
            alpha=alpha,
            effective_alpha=loaded.effective_alpha,
            reward=measures["reward"].value if "reward" in measures else None,
            kl=measures["kl"].value,
            feasible=not reasons,
            infeasible_because=reasons,
            measures=measures,
            failures=observed.failures(alpha),
            deployment_id=loaded.deployment_id,
            load_seconds=loaded.load_seconds,
            generate_seconds=loaded.generate_seconds,
        )


def _samples(observed: Observed, series: Sequence[Series]) -> Iterator[SampleScores]:
    for alpha, prompt in sorted(observed.answers):
        key = alpha, prompt
        yield SampleScores(
            alpha=alpha,
            prompt=prompt,
            finish_reason=observed.answers[key].finish_reason,
            scores={one.name: one.samples[key] for one in series if key in one.samples},
        )


def _rounding(observed: Observed) -> Iterator[str]:
    """Yield which alphas are others after rounding: the order of two such alphas means less than it seems."""
    moved = [
        f"{format_alpha(alpha)} is {one.effective_alpha:.2g}"
        for alpha, one in sorted(observed.loaded.items())
        if one.effective_alpha is not None and abs(one.effective_alpha - alpha) > _MISSED * abs(alpha)
    ]
    if moved:
        yield f"In the weights, after rounding, alpha {', '.join(moved)}: see --rounding."
