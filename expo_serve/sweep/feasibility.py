"""Which alphas are feasible: no collapse, no loss of a capability beyond the margin, KL within its budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from expo_serve.errors import count_of
from expo_serve.sweep.statistics import ONE_SIDED, Array, Estimate, Flags, mean, mean_of_bounded, questions_needed

PROMPTS = ""
"""Names the prompts among the kinds of rows that are resampled; a task names its questions."""
_NONE: Mapping[str, Array] = {}


@dataclass(frozen=True, eq=False)
class Constraint(ABC):
    """What an alpha must keep. Weights give, by kind of row, how often each resample has each row; by default once."""

    rows: str
    """Kind of the rows: :data:`PROMPTS`, or a task."""
    values: Array
    """Of the shape (rows, alphas), NaN where there is none."""
    zero: int
    """Index of alpha 0."""

    @abstractmethod
    def broken(self, weights: Mapping[str, Array] = _NONE) -> Flags:
        """Return which alphas break it, of the shape (resamples, alphas); alpha 0 never does."""

    @abstractmethod
    def reason(self, alpha: int) -> str:
        """Return a line that says why the alpha of this index breaks it."""

    def remark(self, broken: Sequence[int]) -> str | None:
        """Return what the data cannot show, given the alphas that break it; None if there is nothing to say."""
        return None

    @property
    def changes(self) -> Array:
        """Differences from alpha 0, by row."""
        return self.values - self.values[:, [self.zero]]

    def _except_zero(self, broken: Flags) -> Flags:
        broken[:, self.zero] = False
        return broken

    def _levels(self, alpha: int) -> tuple[float, float]:
        """Return the means at an alpha and at alpha 0 over the rows that both have, in percent."""
        both = np.isfinite(self.changes[:, alpha])
        return 100 * float(self.values[both, alpha].mean()), 100 * float(self.values[both, self.zero].mean())


@dataclass(frozen=True, eq=False)
class Answered(Constraint):
    """Answers to compare: an alpha at which every prompt failed is not feasible. ``values`` are any of answers."""

    def broken(self, weights: Mapping[str, Array] = _NONE) -> Flags:
        """Return which alphas have no answer to a prompt that alpha 0 has answered; none if it has answered none."""
        pairs = np.isfinite(self.changes).sum(axis=0, keepdims=True)
        is_comparable = np.isfinite(self.values[:, self.zero]).sum() > 0
        return self._except_zero((pairs == 0) & is_comparable)

    def reason(self, alpha: int) -> str:
        return "no prompt has an answer both at this alpha and at alpha 0"


@dataclass(frozen=True, eq=False)
class NoCollapse(Constraint):
    """A share that may rise by no more than a margin; a rise that noise explains does not count.

    An alpha breaks it if the rise is over the margin and its 95% interval is above 0. In simulations with 40 prompts of
    which 10% are unfinished at every alpha, the first alone refuses 17% of the alphas, both together 2%, and at most
    2.7% with 10 to 256 prompts and shares of 5 to 30%.
    """

    what: str
    """Names the share in messages."""
    margin: float

    def estimate(self, weights: Mapping[str, Array] = _NONE) -> Estimate:
        """Estimate the rise."""
        return mean(self.changes, weights.get(self.rows))

    def broken(self, weights: Mapping[str, Array] = _NONE) -> Flags:
        rise = self.estimate(weights)
        return self._except_zero((rise.value > self.margin) & (rise.low() > 0))

    def reason(self, alpha: int) -> str:
        rise = self.estimate()
        level, before = self._levels(alpha)
        low, high = 100 * float(rise.low()[0, alpha]), min(100.0, 100 * float(rise.high()[0, alpha]))
        return (
            f"{self.what}: {level:.1f}% after {before:.1f}% at alpha 0, a rise of {level - before:.1f} pp "
            f"(95% interval {low:.1f} to {high:.1f} pp, {self._count(alpha)}); at most {100 * self.margin:g} pp is "
            "allowed"
        )

    def _count(self, alpha: int) -> str:
        return count_of(int(np.isfinite(self.changes[:, alpha]).sum()), "prompt")


@dataclass(frozen=True, eq=False)
class NotInferior(Constraint):
    """A capability that must be shown to have lost less than a margin: paired non-inferiority.

    The lower one-sided 95% bound of the mean change must be above ``-margin``. With few questions that cannot be shown,
    and nothing but alpha 0 is feasible. Each task must show it by itself: an average could hide a loss. The bound is
    that of :func:`~expo_serve.sweep.statistics.mean_of_bounded`.
    """

    margin: float

    def estimate(self, weights: Mapping[str, Array] = _NONE) -> Estimate:
        """Estimate the change."""
        return mean_of_bounded(self.changes, weights.get(self.rows))

    def broken(self, weights: Mapping[str, Array] = _NONE) -> Flags:
        return self._except_zero(~(self.estimate(weights).low(ONE_SIDED) > -self.margin))

    def reason(self, alpha: int) -> str:
        count = int(np.isfinite(self.changes[:, alpha]).sum())
        if not count:
            return f"capability {self.rows}: no question has an answer both at this alpha and at alpha 0"
        level, before = self._levels(alpha)
        bound = -100 * float(self.estimate().low(ONE_SIDED)[0, alpha])
        return (
            f"capability {self.rows}: {level:.1f}% after {before:.1f}% at alpha 0; a loss of up to {bound:.1f} pp is "
            f"not excluded (one-sided 95% bound, {count_of(count, 'question')}); the margin is {100 * self.margin:g} pp"
        )

    def remark(self, broken: Sequence[int]) -> str | None:
        """Return how many questions would be needed, if an alpha lacks them rather than the capability."""
        seen = np.isfinite(self.changes)
        lacking = [at for at in broken if seen[:, at].any() and np.nanmean(self.changes[:, at]) > -self.margin]
        if not lacking or not self.margin:
            return None
        differing = max((np.nansum(np.abs(self.changes[:, at])) + 2) / (seen[:, at].sum() + 2) for at in lacking)
        needed = questions_needed(float(differing), self.margin)
        return (
            f"Capability {self.rows}: {count_of(len(self.values), 'question')}, up to {100 * differing:.0f}% answered "
            f"otherwise than at alpha 0: to show in 80% of sweeps that no loss is beyond {100 * self.margin:g} pp "
            f"takes about {rounded_up(needed)}."
        )


@dataclass(frozen=True, eq=False)
class WithinBudget(Constraint):
    """KL from alpha 0 within a budget; ``values`` are sums over the tokens of each answer."""

    tokens: Array
    """Tokens of each answer, of the shape of ``values``."""
    budget: float
    """Nats per token."""

    def broken(self, weights: Mapping[str, Array] = _NONE) -> Flags:
        """Return which alphas are over the budget; those too whose KL is not known while that of others is."""
        if not np.isfinite(self.values).any():
            return np.zeros((len(weights[self.rows]) if self.rows in weights else 1, self.values.shape[1]), dtype=bool)
        return self._except_zero(~(self._kl(weights) <= self.budget))

    def reason(self, alpha: int) -> str:
        kl = float(self._kl(_NONE)[0, alpha])
        if not np.isfinite(kl):
            return "KL from alpha 0 is not known: no answer was scored under alpha 0"
        return f"KL from alpha 0: {kl:.3g} nats per token, over the budget of {self.budget:g}"

    def remark(self, broken: Sequence[int]) -> str | None:
        if np.isfinite(self.values).any() or self.values.shape[1] < 2:
            return None
        return "The budget of KL was not applied: no answer was scored under alpha 0."

    def _kl(self, weights: Mapping[str, Array]) -> Array:
        rows = weights.get(self.rows, np.ones((1, len(self.values))))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray((rows @ np.nan_to_num(self.values)) / (rows @ np.nan_to_num(self.tokens)))


def rounded_up(number: float) -> str:
    """Return a number of things with two digits, rounded up."""
    scale = 10 ** max(0, len(str(int(number))) - 2)
    return f"{int(-(-number // scale) * scale):,}"
