"""Planted data: what a sweep could have observed if an alpha did this or that, of which the truth is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from expo_serve.sweep.feasibility import PROMPTS, NoCollapse, NotInferior
from expo_serve.sweep.grid import DEFAULT_ALPHAS
from expo_serve.sweep.observations import Answer, Loaded, Observation, Preference, Question, ReferenceLogprobs, Score
from expo_serve.sweep.rule import Evidence, Outcome, apply_rule, split
from expo_serve.sweep.statistics import Array

Curve = Callable[[Array], Array]
REWARD = "python:planted:reward"
LIMIT = 256
"""Tokens at which an answer is cut."""


def flat(alphas: Array) -> Array:
    """What no alpha changes."""
    return np.zeros_like(alphas)


def rising_to(top: float, gain: float) -> Curve:
    """A gain that grows to its full size at an alpha and stays there."""
    return lambda alphas: gain * np.clip(alphas, 0, top) / top


@dataclass(frozen=True)
class Planted:
    """How rewards and answers come about."""

    prompts: int = 64
    alphas: tuple[float, ...] = DEFAULT_ALPHAS
    gain: Curve = flat
    """What an alpha adds to the reward."""
    of_length: Curve = flat
    """What a length in tokens adds to the reward."""
    growth: float = 0.0
    """Growth of the length: by ``exp(growth * alpha)``."""
    collapse_from: float | None = None
    """Alpha past which answers become loops up to the limit, with a reward of 3 less; all of them from one more on."""
    loss: Curve = flat
    """Share of the questions whose answer an alpha loses."""
    questions: int = 0
    noise: float = 0.5
    """Scatter of the reward between two answers to one prompt; between prompts it is 1."""


def tables(planted: Planted, seed: int) -> tuple[Array, Array, Array]:
    """Rewards, lengths and loops of the shape (prompts, alphas)."""
    rng = np.random.default_rng(seed)
    alphas, shape = np.array(planted.alphas), (planted.prompts, len(planted.alphas))
    spread = np.exp(rng.normal(4.4, 0.4, (planted.prompts, 1))) * np.exp(rng.normal(0, 0.35, shape))
    length = np.maximum(1.0, np.round(np.exp(planted.growth * alphas) * spread))
    reward = rng.normal(0, 1, (planted.prompts, 1)) + rng.normal(0, planted.noise, shape)
    reward += planted.gain(alphas) + planted.of_length(length)
    loops = np.zeros(shape, dtype=bool)
    if planted.collapse_from is not None:
        loops = rng.random(shape) < alphas - planted.collapse_from
    return np.where(loops, reward - 3, reward), np.minimum(np.where(loops, LIMIT, length), LIMIT), loops.astype(float)


def answered(planted: Planted, seed: int) -> Array:
    """Scores of questions, 0 or 1, of the shape (questions, alphas): losses, and as much luck in both directions."""
    rng = np.random.default_rng([seed, 1])
    alphas = np.array(planted.alphas)
    known = (rng.random((planted.questions, 1)) < 0.65).astype(float)
    draw = rng.random((planted.questions, len(alphas)))
    lost = known * (draw < (planted.loss(alphas) + 0.02 * (alphas != 0)) / 0.65)
    won = (1 - known) * (draw < 0.02 * (alphas != 0) / 0.35)
    return np.asarray(known - lost + won)


def evidence(planted: Planted, seed: int) -> Evidence:
    """What the rule looks at."""
    reward, length, loops = tables(planted, seed)
    zero = planted.alphas.index(0.0)
    constraints = [NoCollapse(PROMPTS, np.maximum(loops, length >= LIMIT), zero, "unfinished answers", 0.05)]
    tasks = [NotInferior("task", answered(planted, seed), zero, 0.02)] if planted.questions else []
    return Evidence(planted.alphas, reward, length, (*constraints, *tasks))


def chosen(planted: Planted, seed: int) -> float:
    """The alpha that the rule recommends."""
    found = evidence(planted, seed)
    return found.alphas[int(outcome(found, seed).chosen[0])]


def outcome(found: Evidence, seed: int = 0) -> Outcome:
    """What the rule makes of evidence."""
    return apply_rule(found, *split(found, seed))


def observations(planted: Planted, seed: int, *, judge: bool = False) -> Iterator[Observation]:
    """The same as a sweep would have written it.

    Args:
        planted: how it comes about.
        seed: of all that is random.
        judge: whether the reward only compares: a choice of 0, 0.5 or 1 between two answers.
    """
    rng = np.random.default_rng([seed, 2])
    reward, length, loops = tables(planted, seed)
    correct = answered(planted, seed)
    zero = planted.alphas.index(0.0)
    for at, alpha in enumerate(planted.alphas):
        for prompt in range(planted.prompts):
            yield _answer(rng, alpha, prompt, int(length[prompt, at]), is_loop=bool(loops[prompt, at]))
            if alpha:
                yield ReferenceLogprobs(
                    alpha=alpha, prompt=prompt, logprobs=(-0.5 - alpha / 4,) * int(length[prompt, at])
                )
            if not judge:
                yield Score(alpha=alpha, prompt=prompt, reward=REWARD, value=float(reward[prompt, at]))
            elif alpha:
                better = reward[prompt, at] - reward[prompt, zero]
                value = 0.5 if abs(better) < 0.2 else float(better > 0)
                yield Preference(alpha=alpha, prompt=prompt, reward=REWARD, value=value)
        for question in range(planted.questions):
            yield Question(alpha=alpha, task="task", question=str(question), correct=float(correct[question, at]))
        yield loaded(alpha)


def loaded(alpha: float, effective: float | None = None) -> Loaded:
    """The end of an alpha."""
    return Loaded(
        alpha=alpha,
        effective_alpha=alpha if effective is None else effective,
        deployment_id=f"{alpha:016.4f}",
        load_seconds=1.5,
        generate_seconds=2.5,
    )


def _answer(rng: np.random.Generator, alpha: float, prompt: int, length: int, *, is_loop: bool) -> Answer:
    tokens = tuple(int(token) for token in (np.arange(length) % 7 if is_loop else rng.integers(0, 5000, length)))
    return Answer(
        alpha=alpha,
        prompt=prompt,
        text=" ".join(map(str, tokens)),
        prompt_tokens=(1, 2, 3),
        tokens=tokens,
        logprobs=(-0.5,) * length,
        finish_reason="length" if length >= LIMIT else "stop",
    )
