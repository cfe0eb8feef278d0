"""Measures of rewards: their level, and what an alpha gains over alpha 0."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from expo_serve.sweep.gains import length_terms, with_length_control
from expo_serve.sweep.measures.answers import lengths
from expo_serve.sweep.measures.measure import Measure, Series, at_zero, from_estimate, means, means_of, measured
from expo_serve.sweep.observed import Observed
from expo_serve.sweep.results import Measured, MeasureInfo
from expo_serve.sweep.statistics import Array


class RewardLevel(Measure):
    """Mean of a reward over the answers at an alpha: ``mean_i r(x_i, y_i)``.

    The measure of ExPO's authors (arXiv 2404.16792, 3.1). A judge that only compares gives the share of its choices for
    the answer at this alpha over the one at alpha 0, which itself has 0.5.
    """

    name = "reward"

    def series(self, observed: Observed, rewards: Sequence[str]) -> Iterator[Series]:
        for name, reward in _named(self.name, rewards):
            cells = observed.rewards(reward)
            if not cells:
                continue
            compares = observed.compares_only(reward)
            info = MeasureInfo(
                label=_label("Preference over alpha 0" if compares else "Reward", name, reward),
                unit="share" if compares else "",
                better="higher",
                formula="share of the choices for this alpha, over both orders" if compares else "mean_i r(x_i, y_i)",
            )
            found = means(observed, cells)
            if compares:
                found[0.0] = at_zero(0.5, found[0.0].n)
            yield Series(name, info, found, cells)


class RewardChange(Measure):
    """Mean of the differences between the reward at an alpha and at alpha 0, paired by prompt."""

    name = "reward_change"

    def series(self, observed: Observed, rewards: Sequence[str]) -> Iterator[Series]:
        for name, reward in _named(self.name, rewards):
            if not (cells := observed.rewards(reward)):
                continue
            found = means_of(observed, _gains(observed.of_answers(cells), observed.zero))
            found[0.0] = at_zero(0.0, found[0.0].n)
            yield Series(name, _gain_info("Reward gain", observed, name, reward, _CHANGE), found)


class LengthControlledReward(Measure):
    """What an alpha gains over alpha 0 where its answers are as long: the intercept of a regression, paired by prompt.

    For each alpha ``r_ia - r_i0 = m_a + b_a * (len_ia - len_i0) + c_a * (log len_ia - log len_i0) + e_ia``; reported is
    ``m_a``, with HC3 errors: :func:`~expo_serve.sweep.gains.with_length_control`. The idea is that of AlpacaEval's
    length-controlled win rates (Dubois et al. 2024, arXiv 2404.04475), on scores.
    """

    name = "reward_lc"

    def series(self, observed: Observed, rewards: Sequence[str]) -> Iterator[Series]:
        length = observed.of_answers(lengths(observed))
        for name, reward in _named(self.name, rewards):
            if not (cells := observed.rewards(reward)):
                continue
            gains = _gains(observed.of_answers(cells), observed.zero)
            terms = length_terms(length, observed.zero)
            estimate = with_length_control(gains, terms)
            counts = (np.isfinite(gains) & np.isfinite(terms).all(axis=2)).sum(axis=0)
            found = {alpha: _if_known(one) for alpha, one in from_estimate(observed, estimate, counts).items() if alpha}
            found[0.0] = at_zero(0.0, int(counts[observed.zero]))
            info = _gain_info("Length-controlled reward gain", observed, name, reward, _CONTROLLED)
            yield Series(name, info, dict(sorted(found.items())))


class WinRate(Measure):
    """Share of the prompts whose answer has the higher reward than that at alpha 0, ties as half a win.

    ``mean_i (1[r_ia > r_i0] + 1[r_ia = r_i0] / 2)``: robust to outliers of the reward. Of a judge that only compares,
    the mean of its preferences.
    """

    name = "win_rate"

    def series(self, observed: Observed, rewards: Sequence[str]) -> Iterator[Series]:
        for name, reward in _named(self.name, rewards):
            if not (cells := observed.rewards(reward)):
                continue
            table = observed.of_answers(cells)
            wins = table if observed.compares_only(reward) else (np.sign(_gains(table, observed.zero)) + 1) / 2
            found = {alpha: _within_shares(one) for alpha, one in means_of(observed, wins).items()}
            found[0.0] = at_zero(0.5, found[0.0].n)
            info = MeasureInfo(
                label=_label("Win rate against alpha 0", name, reward),
                unit="share",
                better="higher",
                formula="mean of 1 for a higher reward than at alpha 0 and 1/2 for the same",
            )
            yield Series(name, info, found)


_CHANGE = "mean of r_ia - r_i0, paired by prompt"
_CONTROLLED = "m_a of r_ia - r_i0 = m_a + b (len_ia - len_i0) + c (log len_ia - log len_i0) + e_ia"


def _named(name: str, rewards: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the name of each reward's series: the first has the measure's own."""
    for index, reward in enumerate(rewards):
        yield (f"{name}:{reward}" if index else name), reward


def _label(label: str, name: str, reward: str) -> str:
    return f"{label}: {reward}" if ":" in name else label


def _gain_info(label: str, observed: Observed, name: str, reward: str, formula: str) -> MeasureInfo:
    return MeasureInfo(
        label=_label(label, name, reward),
        unit="share" if observed.compares_only(reward) else "",
        better="higher",
        formula=formula,
    )


def _gains(table: Array, zero: int) -> Array:
    return table - table[:, [zero]]


def _if_known(one: Measured) -> Measured:
    """Return a value only with its interval: a regression with too few prompts has none."""
    return Measured(value=None, n=one.n) if one.low is None else one


def _within_shares(one: Measured) -> Measured:
    if one.value is None or one.low is None or one.high is None:
        return one
    return measured(one.value, max(0.0, one.low), min(1.0, one.high), one.n)
