"""Measures of the model at an alpha: its weights, its distance from alpha 0, what it has kept of its abilities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from expo_serve.sweep.measures.measure import (
    Measure,
    Series,
    at_zero,
    from_estimate,
    measured,
    shares,
)
from expo_serve.sweep.measures.refusals import refuses
from expo_serve.sweep.observed import Cells, Observed
from expo_serve.sweep.results import Measured, MeasureInfo
from expo_serve.sweep.statistics import Array, Estimate, mean, mean_of_bounded, ratio


class EffectiveAlpha(Measure):
    """Alpha as it is in the weights after rounding: ``sum((result - aligned) * step) / sum(step ** 2)``.

    The step is aligned - base. Measured while the weights were loaded: docs/number-rule.md#effective-alpha.
    """

    name = "effective_alpha"

    def series(self, observed: Observed, rewards: Sequence[str]) -> Iterator[Series]:
        info = MeasureInfo(
            label="Effective alpha",
            unit="",
            better="",
            formula="sum((result - aligned) * step) / sum(step ** 2), step = aligned - base",
        )
        found = {alpha: Measured(value=one.effective_alpha) for alpha, one in observed.loaded.items()}
        yield Series(self.name, info, dict(sorted(found.items())))


class Kl(Measure):
    """KL divergence from alpha 0 in nats per token: the mean of ``(q/p - 1) - log(q/p)`` over tokens of answers.

    ``p`` is a token's probability under the alpha that sampled it, ``q`` the one under alpha 0. The estimator is k3 of
    Schulman (2020, Approximating KL Divergence, joschu.net/blog/kl-approx.html): never negative, and unbiased where
    the answers are sampled at temperature 1 without cuts, along such answers. At another temperature it is an estimate
    along the answers that were sampled. The interval takes answers, not tokens, as independent.
    """

    name = "kl"

    def series(self, observed: Observed, rewards: Sequence[str]) -> Iterator[Series]:
        info = MeasureInfo(
            label="KL from alpha 0",
            unit="nats/token",
            better="",
            formula="mean over tokens of (q/p - 1) - log(q/p), p under the alpha that sampled, q under alpha 0",
        )
        sums, tokens = kl_sums(observed)
        above, below = observed.of_answers(sums), observed.of_answers(tokens)
        found = {alpha: _ratio(above[:, at], below[:, at]) for at, alpha in enumerate(observed.alphas)}
        found[0.0] = at_zero(0.0, sum(alpha == 0 for alpha, _ in observed.answers))
        yield Series(self.name, info, found, {key: value / tokens[key] for key, value in sums.items()})


class Perplexity(Measure):
    """Perplexity of the held-out text of ``--text``: ``exp(-sum log p / tokens)``.

    Jelinek et al. (1977, Journal of the Acoustical Society of America 62:S63). The interval takes windows of text as
    independent; it is of the text's choice, so it says little about differences between alphas on the same text.
    """

    name = "perplexity"

    def series(self, observed: Observed, rewards: Sequence[str]) -> Iterator[Series]:
        info = MeasureInfo(
            label="Perplexity of held-out text", unit="", better="lower", formula="exp(-sum of log p / tokens)"
        )
        lines = sorted({line for _, line in observed.texts})
        if not lines:
            return
        surprise = observed.table({key: -one.logprob for key, one in observed.texts.items()}, lines)
        tokens = observed.table({key: float(one.tokens) for key, one in observed.texts.items()}, lines)
        found = {
            alpha: _exponential(_ratio(surprise[:, at], tokens[:, at], least=-math.inf))
            for at, alpha in enumerate(observed.alphas)
        }
        yield Series(self.name, info, found)


class Capability(Measure):
    """Accuracy in tasks of lm-evaluation-harness: its mean score of each task's questions, and the mean over tasks.

    The interval of a task is Wilson's where the scores are zeros and ones. Intervals of two alphas may overlap though
    their difference is certain, because both answer the same questions: for that see :class:`CapabilityChange`.
    """

    name = "capability"

    def series(self, observed: Observed, rewards: Sequence[str]) -> Iterator[Series]:
        tables = {task: observed.of_task(task) for task in sorted(observed.questions)}
        if not tables:
            return
        formula = "mean score of a task's questions, mean over tasks"
        info = MeasureInfo(label="Capability", unit="share", better="higher", formula=formula)
        every = [mean(table) for table in tables.values()]
        yield Series(self.name, info, _over_tasks(observed, every, tables))
        for task, table in tables.items():
            yield Series(f"{self.name}:{task}", _named(info, task), shares(observed, table))


class CapabilityChange(Measure):
    """Accuracy at an alpha less accuracy at alpha 0, paired by question; and the mean over tasks.

    The interval is that of Bonett and Price: :func:`~expo_serve.sweep.statistics.mean_of_bounded`. The rule compares
    its one-sided lower bound with the margin.
    """

    name = "capability_change"

    def series(self, observed: Observed, rewards: Sequence[str]) -> Iterator[Series]:
        tables = {task: _change(observed.of_task(task), observed.zero) for task in sorted(observed.questions)}
        if not tables:
            return
        formula = "score - score at alpha 0, mean over the questions that both answered"
        info = MeasureInfo(label="Capability, change from alpha 0", unit="share", better="higher", formula=formula)
        every = [_bounded(table) for table in tables.values()]
        yield Series(self.name, info, _over_tasks(observed, every, tables, is_change=True))
        for task, table in tables.items():
            yield Series(
                f"{self.name}:{task}", _named(info, task), _over_tasks(observed, [_bounded(table)], {task: table}, True)
            )


class OverRefusal(Measure):
    """Share of the answers to harmless prompts, those of ``--refusals``, that refuse.

    What refuses is decided by how an answer begins: :func:`~expo_serve.sweep.measures.refusals.refuses`. The measure is
    XSTest's (Röttger et al. 2024, arXiv 2308.01263). The interval is Wilson's.
    """

    name = "over_refusal"

    def series(self, observed: Observed, rewards: Sequence[str]) -> Iterator[Series]:
        info = MeasureInfo(
            label="Over-refusal",
            unit="share",
            better="lower",
            formula="share of the answers to harmless prompts that begin like a refusal",
        )
        found = {key: float(refuses(answer.text)) for key, answer in observed.refusals.items()}
        if found:
            yield Series(self.name, info, shares(observed, observed.table(found, sorted({key[1] for key in found}))))


def kl_sums(observed: Observed) -> tuple[Cells[int], Cells[int]]:
    """Return for each answer that was scored under alpha 0 the sum of k3 over its tokens, and how many they are."""
    sums: Cells[int] = {}
    tokens: Cells[int] = {}
    for key, reference in observed.references.items():
        answer = observed.answers.get(key)
        if answer is None or not answer.logprobs or len(answer.logprobs) != len(reference.logprobs):
            continue
        log_ratio = np.array(reference.logprobs) - np.array(answer.logprobs)
        with np.errstate(over="ignore", invalid="ignore"):
            total = float(np.sum(np.expm1(log_ratio) - log_ratio))
        if math.isfinite(total):
            sums[key], tokens[key] = total, float(len(log_ratio))
    return sums, tokens


def _ratio(above: Array, below: Array, least: float = 0.0) -> Measured:
    estimate = ratio(above, below)
    low = max(least, float(estimate.low()[0]))
    return measured(float(estimate.value[0]), low, float(estimate.high()[0]), int(np.isfinite(above).sum()))


def _exponential(one: Measured) -> Measured:
    value, low, high = (None if number is None else _exp(number) for number in (one.value, one.low, one.high))
    if value is None:
        return Measured(value=None, n=one.n)
    return measured(value, math.nan if low is None else low, math.nan if high is None else high, one.n)


def _exp(number: float) -> float:
    try:
        return math.exp(number)
    except OverflowError:
        return math.inf


def _change(table: Array, zero: int) -> Array:
    return table - table[:, [zero]]


def _bounded(changes: Array) -> Estimate:
    """Return the mean change, with the error of Bonett and Price."""
    return mean_of_bounded(changes)._replace(value=mean(changes).value)


def _over_tasks(
    observed: Observed, estimates: Sequence[Estimate], tables: dict[str, Array], is_change: bool = False
) -> dict[float, Measured]:
    """Return the mean over tasks; each counts the same, as in leaderboards, and their questions are independent."""
    value = np.mean([one.value for one in estimates], axis=0)
    error = np.sqrt(np.sum([one.error**2 for one in estimates], axis=0)) / len(estimates)
    freedom = np.min([one.freedom for one in estimates], axis=0)
    counts = np.sum([np.isfinite(table).sum(axis=0) for table in tables.values()], axis=0)
    found = from_estimate(observed, Estimate(value, error, freedom), counts)
    if is_change:
        found[0.0] = at_zero(0.0, found[0.0].n)
    return found


def _named(info: MeasureInfo, part: str) -> MeasureInfo:
    return info.model_copy(update={"label": f"{info.label}: {part}"})
