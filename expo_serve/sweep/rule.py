"""The rule by which an alpha is chosen, run on the data and on resamples of it alike.

1. Feasible are the alphas that break no constraint (:mod:`expo_serve.sweep.feasibility`), judged on all prompts.
2. On one half of the prompts, drawn by the seed: among the feasible alphas the one with the largest gain over alpha 0,
   and then the one nearest to 0 whose gain is within one standard error of that (Breiman et al. 1984, Classification
   and Regression Trees, 3.4.3). Alpha 0 itself, with a gain of 0, takes part.
3. On the other half: that alpha is recommended if the 95% interval of its gain is above 0, and the mean reward is not
   below that at alpha 0 either; else alpha 0 is. One alpha is tested, on prompts that had no part in its choice, so it
   makes no difference how many were tried: where none helps, at most 2.5% of all sweeps recommend one.
4. The gain is that of the length-controlled reward where each half has eight prompts or more, else of the reward.

The mean reward is in 3 because a reward that falls with the length makes length control credit an alpha for long
answers. In a simulation of that with 256 prompts, where the mean reward falls by a tenth of its scatter, the interval
alone recommended an alpha in 94% of the cases, with the mean reward in 22%.

In simulations of pure noise, and of a reward that grows with length alone, 20 to 256 prompts and ten alphas, 0.4 to
2.1% of the sweeps recommended another alpha than 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from expo_serve.sweep.feasibility import PROMPTS, Constraint
from expo_serve.sweep.gains import LEAST_CONTROLLED, length_terms, with_length_control, without_length_control
from expo_serve.sweep.statistics import Array, Estimate, Flags, batches, mean, resampled, resampled_halves

Indices = npt.NDArray[np.intp]
_NONE: Mapping[str, Array] = {}


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the rule looks at."""

    alphas: tuple[float, ...]
    """Rising, 0 among them: the columns of all tables."""
    rewards: Array
    """Of the shape (prompts, alphas), NaN where there is none."""
    lengths: Array
    """Tokens of the answers, likewise."""
    constraints: tuple[Constraint, ...] = field(default=())

    @property
    def zero(self) -> int:
        """Index of alpha 0."""
        return self.alphas.index(0.0)

    @cached_property
    def scored(self) -> Indices:
        """Prompts whose answer at alpha 0 has a reward: only they can be compared, and are split."""
        return np.flatnonzero(np.isfinite(self.rewards[:, self.zero]))

    @cached_property
    def controls_length(self) -> bool:
        """Whether both halves have prompts enough to control for the length."""
        return int(np.isfinite(self.lengths[self.scored, self.zero]).sum()) // 2 >= LEAST_CONTROLLED

    @cached_property
    def gains(self) -> Array:
        """Differences of the reward from alpha 0, by prompt."""
        return self.rewards - self.rewards[:, [self.zero]]

    @cached_property
    def nearest_first(self) -> Indices:
        """Indices of the alphas by their distance from 0; of two as far, the positive one first."""
        return np.asarray(np.lexsort([np.array(self.alphas) < 0, np.abs(self.alphas)]))

    def feasible(self, weights: Mapping[str, Array] = _NONE) -> Flags:
        """Return which alphas break no constraint, of the shape (resamples, alphas)."""
        allowed = np.ones((1, len(self.alphas)), dtype=bool)
        for constraint in self.constraints:
            allowed = allowed & ~constraint.broken(weights)
        return allowed

    def gain(self, weights: Array) -> Estimate:
        """Estimate the gain of each alpha, of the shape (resamples, alphas).

        Args:
            weights: how often each resample has each prompt, of the shape (resamples, prompts).
        """
        if self.controls_length:
            return with_length_control(self.gains, self._terms, weights)
        return without_length_control(self.gains, weights)

    def pairs(self, weights: Array) -> list[int]:
        """Return how many prompts of one resample compare each alpha with alpha 0.

        Args:
            weights: of the shape (1, prompts).
        """
        there = np.isfinite(self.gains)
        if self.controls_length:
            there &= np.isfinite(self._terms).all(axis=2)
        return [int(count) for count in weights[0] @ there]

    @cached_property
    def _terms(self) -> Array:
        return length_terms(self.lengths, self.zero)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the rule makes of each resample; columns and indices are those of the alphas."""

    feasible: Flags
    gain: Estimate
    """On the selection half, of the shape (resamples, alphas)."""
    best: Indices
    """The feasible alpha other than 0 with the largest gain; that of alpha 0 where there is none."""
    nearest: Indices
    """The alpha nearest to 0 within one standard error of it; of alpha 0 if that is."""
    tested: Indices
    """``nearest``, or ``best`` where that is alpha 0."""
    effect: Estimate
    """Gain of ``tested`` on the unseen half, of the shape (resamples,)."""
    plain: Array
    """Mean change of the reward that goes with ``effect``."""
    chosen: Indices
    """What is recommended."""


def apply_rule(evidence: Evidence, selection: Array, unseen: Array, weights: Mapping[str, Array] = _NONE) -> Outcome:
    """Apply the rule to each resample.

    Args:
        evidence: what was observed.
        selection: how often each resample has each prompt in its selection half, of the shape (resamples, prompts).
        unseen: likewise for the other half.
        weights: how often each resample has each row that constraints are over, by kind of row; each once by default.
    """
    zero = evidence.zero
    feasible = np.broadcast_to(evidence.feasible(weights), (len(selection), len(evidence.alphas)))
    gain = evidence.gain(selection)
    candidates = feasible & np.isfinite(gain.error)
    candidates[:, zero] = False
    best = np.where(candidates.any(axis=1), np.where(candidates, gain.value, -np.inf).argmax(axis=1), zero)
    nearest = _nearest(evidence, candidates, gain, best)
    tested = np.where(nearest == zero, best, nearest)
    effect = Estimate(*(_of(part, tested) for part in evidence.gain(unseen)))
    plain = _of(mean(evidence.gains, unseen).value, tested)
    is_shown = (nearest != zero) & (effect.low() > 0) & (plain > 0)
    return Outcome(feasible, gain, best, nearest, tested, effect, plain, np.where(is_shown, nearest, zero))


def _nearest(evidence: Evidence, candidates: Flags, gain: Estimate, best: Indices) -> Indices:
    """Return the alpha nearest to 0 whose gain is within one standard error of the best; alpha 0's gain is 0."""
    zero, order = evidence.zero, evidence.nearest_first
    least = _of(gain.value, best) - _of(gain.error, best)
    is_near = candidates & (gain.value >= least[:, None])
    is_near[:, zero] = (best == zero) | (least <= 0)
    return np.asarray(order[is_near[:, order].argmax(axis=1)])


def _of(table: Array, columns: Indices) -> Array:
    """Return one column's value of each row."""
    return np.asarray(np.take_along_axis(table, columns[:, None], axis=1)[:, 0])


def split(evidence: Evidence, seed: int) -> tuple[Array, Array]:
    """Split the prompts by a seed; returns weights of the selection half and of the unseen half, of one row each.

    Of an odd number of prompts the unseen half has one more.
    """
    order = np.random.default_rng(seed).permutation(evidence.scored)
    half = len(order) // 2
    first, second = (np.isin(evidence.scored, part)[None].astype(np.float64) for part in (order[:half], order[half:]))
    return _among_all(evidence, first), _among_all(evidence, second)


def choose_again(evidence: Evidence, seed: int, resamples: int) -> Indices:
    """Return which alpha the whole rule chooses in each of so many bootstrap resamples.

    Each splits the prompts anew, draws with replacement within each half, so that no prompt is in both, and draws the
    questions of each task with replacement.
    """
    rng = np.random.default_rng([seed, 1])
    tasks = {one.rows: len(one.values) for one in evidence.constraints if one.rows != PROMPTS}
    largest = max([len(evidence.rewards), *tasks.values()])
    chosen = [_draw(evidence, rng, tasks, size) for size in batches(resamples, largest)]
    return np.concatenate([np.zeros(0, dtype=np.intp), *chosen])


def _draw(evidence: Evidence, rng: np.random.Generator, tasks: Mapping[str, int], resamples: int) -> Indices:
    first, second = resampled_halves(rng, len(evidence.scored), resamples)
    selection, unseen = _among_all(evidence, first), _among_all(evidence, second)
    weights = {task: resampled(rng, count, resamples) for task, count in tasks.items()}
    return apply_rule(evidence, selection, unseen, {PROMPTS: selection + unseen, **weights}).chosen


def _among_all(evidence: Evidence, weights: Array) -> Array:
    """Return weights of the scored prompts as weights of all prompts."""
    every = np.zeros((len(weights), len(evidence.rewards)))
    every[:, evidence.scored] = weights
    return every
