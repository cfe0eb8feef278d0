"""Puts what the rule has found into words: the decision, its reason, and what the data cannot show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from expo_serve.config import format_alpha
from expo_serve.errors import count_of
from expo_serve.sweep.feasibility import PROMPTS, Constraint, NoCollapse, rounded_up
from expo_serve.sweep.gains import LEAST_CONTROLLED, LEAST_PAIRS
from expo_serve.sweep.results import Decision, Effect
from expo_serve.sweep.rule import Evidence, Indices, Outcome
from expo_serve.sweep.statistics import Flags, pairs_needed, rise_noticed

_LOW, _HIGH = 0.025, 0.975
_NO_SCATTER = 1e-6
"""Of a difference: scatter that is not more is rounding."""


def without_reward(evidence: Evidence, feasible: Flags, *, is_given: bool) -> Decision:
    """Return the decision where there is nothing to maximise.

    Args:
        evidence: what was observed.
        feasible: by alpha.
        is_given: whether a reward was asked for, of which there is no score yet.
    """
    allowed = [alpha for alpha, one in zip(evidence.alphas, feasible, strict=True) if one]
    why = "No answer at alpha 0 has a score of the reward" if is_given else "No --reward was given"
    return Decision(
        kind="none",
        reason=f"{why}, so there is nothing to maximise; "
        f"{len(allowed)} of {count_of(len(evidence.alphas), 'alpha')} {'is' if len(allowed) == 1 else 'are'} feasible.",
        feasible=allowed,
        remarks=list(_of_constraints(evidence)),
    )


def decision(evidence: Evidence, outcome: Outcome, pairs: int, again: Indices) -> Decision:
    """Return the decision.

    Args:
        evidence: what was observed.
        outcome: of the rule on the data, one resample.
        pairs: prompts in the unseen half on which the tested alpha was compared with alpha 0.
        again: the alphas that the rule chooses in bootstrap resamples.
    """
    alphas, chosen, best = evidence.alphas, int(outcome.chosen[0]), int(outcome.best[0])
    is_zero = chosen == evidence.zero
    effect = _effect(evidence, outcome, pairs)
    picked = np.array(alphas)[again]
    low, high = np.quantile(picked, [_LOW, _HIGH], method="inverted_cdf") if len(picked) else (None, None)
    return Decision(
        kind="zero" if is_zero else "alpha",
        reason=_why_zero(evidence, outcome, effect) if is_zero else _why(evidence, outcome, effect),
        feasible=[alpha for alpha, one in zip(alphas, outcome.feasible[0], strict=True) if one],
        best=None if best == evidence.zero else alphas[best],
        effect=effect,
        chosen_share={format_alpha(alpha): count / len(picked) for alpha, count in sorted(Counter(picked).items())},
        alpha_low=None if low is None else float(low),
        alpha_high=None if high is None else float(high),
        remarks=[*_of_rewards(evidence, outcome, effect), *_of_constraints(evidence)],
    )


def _effect(evidence: Evidence, outcome: Outcome, pairs: int) -> Effect | None:
    effect = outcome.effect
    if outcome.tested[0] == evidence.zero or not np.isfinite(effect.error[0]):
        return None
    return Effect(
        alpha=evidence.alphas[outcome.tested[0]],
        measure="reward_lc" if evidence.controls_length else "reward_change",
        difference=float(effect.value[0]),
        low=float(effect.low()[0]),
        high=float(effect.high()[0]),
        n=pairs,
    )


def _why(evidence: Evidence, outcome: Outcome, effect: Effect | None) -> str:
    assert effect is not None
    chosen, best = (format_alpha(evidence.alphas[index[0]]) for index in (outcome.chosen, outcome.best))
    place = "the best" if chosen == best else f"nearest to 0 within one standard error of {best}, the best"
    return (
        f"Alpha {chosen} raises {_what(evidence)} by {_numbers(effect)} on {count_of(effect.n, 'prompt')} that had no "
        f"part in its choice; on the other half of the prompts it was {place} of the feasible alphas."
    )


def _why_zero(evidence: Evidence, outcome: Outcome, effect: Effect | None) -> str:
    if len(evidence.alphas) == 1:
        return "No alpha but 0 was tried."
    if outcome.feasible[0].sum() == 1:
        return "No alpha but 0 is feasible."
    return f"No other alpha is shown to help: {_what_was_seen(evidence, outcome, effect)}."


def _what_was_seen(evidence: Evidence, outcome: Outcome, effect: Effect | None) -> str:
    if effect is None:
        prompts = count_of(len(evidence.scored), "prompt")
        return f"of {prompts} with a reward at alpha 0, too few could be compared; each half needs {LEAST_PAIRS} pairs"
    alpha, what = format_alpha(effect.alpha), _what(evidence)
    numbers = f"{_numbers(effect)} on the {count_of(effect.n, 'prompt')} of the other half"
    if outcome.nearest[0] == evidence.zero:
        best = int(outcome.best[0])
        gain, error = float(outcome.gain.value[0, best]), float(outcome.gain.error[0, best])
        return (
            f"on one half of the prompts the best of the feasible alphas, {alpha}, is not more than a standard error "
            f"above alpha 0 ({gain:+.3g}, standard error {error:.2g}); it changes {what} by {numbers}"
        )
    chosen = f"alpha {alpha}, chosen on one half of the prompts,"
    if effect.low > 0:
        return f"{chosen} raises {what} by {numbers}, but not the mean reward itself ({outcome.plain[0]:+.3g})"
    return f"{chosen} changes {what} by {numbers}"


def _what(evidence: Evidence) -> str:
    return "the length-controlled reward" if evidence.controls_length else "the reward"


def _numbers(effect: Effect) -> str:
    return f"{effect.difference:.3g} (95% interval {effect.low:.3g} to {effect.high:.3g})"


def _of_rewards(evidence: Evidence, outcome: Outcome, effect: Effect | None) -> Iterator[str]:
    """Yield what the rewards cannot show."""
    if not evidence.controls_length:
        yield (
            "The reward is not controlled for the length of the answers, which takes "
            f"{2 * LEAST_CONTROLLED} prompts with a reward and an answer at alpha 0: one that grows with the length "
            "would be taken for a gain."
        )
    if effect is not None and outcome.chosen[0] == evidence.zero:
        yield from _power(outcome, effect)
    yield from _edge(evidence, outcome)


def _power(outcome: Outcome, effect: Effect) -> Iterator[str]:
    deviation = float(outcome.effect.error[0]) * effect.n**0.5
    if deviation <= _NO_SCATTER * abs(effect.difference):
        return
    noticed = deviation * (pairs_needed(1.0, 1.0) / effect.n) ** 0.5
    line = f"With {count_of(effect.n, 'prompt')} in the unseen half, a gain of {noticed:.2g} is found in 80% of sweeps"
    if float(outcome.effect.error[0]) < effect.difference < noticed:
        needed = 2 * pairs_needed(deviation, effect.difference)
        line += f"; for one of {effect.difference:.2g}, as seen there, about {rounded_up(needed)} prompts are needed"
    yield f"{line}."


def _edge(evidence: Evidence, outcome: Outcome) -> Iterator[str]:
    """Yield that the best alpha is the last one on its side, and none beyond it was refused."""
    best = int(outcome.best[0])
    if best != evidence.zero and best in (0, len(evidence.alphas) - 1):
        alpha = format_alpha(evidence.alphas[best])
        yield f"The best alpha on the selection half, {alpha}, is the outermost one tried: a better one may be beyond."


def _of_constraints(evidence: Evidence) -> Iterator[str]:
    """Yield what the constraints cannot show."""
    if len(evidence.alphas) == 1:
        return
    for constraint in evidence.constraints:
        broken = np.flatnonzero(constraint.broken()[0])
        if remark := constraint.remark([int(one) for one in broken]):
            yield remark
    yield from _collapse(evidence.constraints)
    if all(one.rows == PROMPTS for one in evidence.constraints):
        yield "No capability was measured (--lm-eval): a loss of knowledge or reasoning would not be noticed."


def _collapse(constraints: Sequence[Constraint]) -> Iterator[str]:
    count, margin = max(
        ((len(one.values), one.margin) for one in constraints if isinstance(one, NoCollapse)), default=(0, 0.0)
    )
    if count and (noticed := rise_noticed(count, margin)) > 2 * margin:
        yield (
            f"With {count_of(count, 'prompt')}, a rise of unfinished or repetitive answers is noticed in 80% of sweeps "
            f"only from {100 * noticed:.0f} pp on."
        )
