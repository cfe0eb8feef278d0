"""What a sweep has observed, found by alpha and prompt; alphas whose observations are not complete are left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from expo_serve.errors import ExpoError
from expo_serve.sweep.observations import (
    Answer,
    Failure,
    Loaded,
    Observation,
    Preference,
    Question,
    ReferenceLogprobs,
    Score,
    TextLogprob,
)
from expo_serve.sweep.statistics import Array

Key = TypeVar("Key", int, str)
Cells = dict[tuple[float, Key], float]
"""Numbers by alpha and what they are of: a prompt, a text, a question. Only finite ones."""
NEUTRAL = 0.5
"""Preference between an answer at alpha 0 and itself."""


class Observed:
    """Observations, indexed; of two of the same thing the later one counts.

    Args:
        observations: in the order in which they were made.

    Raises:
        ExpoError: alpha 0 is not among the alphas that were observed to their end.
    """

    def __init__(self, observations: Iterable[Observation]) -> None:
        seen = list(observations)
        self.loaded = {one.alpha: one for one in seen if isinstance(one, Loaded)}
        self.alphas: tuple[float, ...] = tuple(sorted(self.loaded))
        """Rising."""
        if 0.0 not in self.loaded:
            found = ", ".join(f"{alpha:g}" for alpha in self.alphas) or "none"
            raise ExpoError(
                f"sweep: alpha 0, with which all others are compared, was not observed to its end; found: {found}; "
                "give --resume to observe it"
            )
        self.answers: dict[tuple[float, int], Answer] = {}
        self.refusals: dict[tuple[float, int], Answer] = {}
        """Answers to the prompts of ``--refusals``."""
        self.references: dict[tuple[float, int], ReferenceLogprobs] = {}
        self.texts: dict[tuple[float, int], TextLogprob] = {}
        self.questions: dict[str, Cells[str]] = {}
        """By task: scores by alpha and question."""
        self._scores: dict[str, Cells[int]] = {}
        self._preferences: dict[str, Cells[int]] = {}
        self._failed: set[tuple[float, str, int, str | None]] = set()
        for one in seen:
            if one.alpha in self.loaded:
                self._take(one)
        self.prompts: tuple[int, ...] = tuple(sorted({prompt for _, prompt in self.answers} | self._scored()))
        """Indices of the prompts, rising: the rows of tables."""

    def _take(self, one: Observation) -> None:
        match one:
            case Answer():
                (self.answers if one.use == "prompt" else self.refusals)[one.alpha, one.prompt] = one
            case ReferenceLogprobs():
                self.references[one.alpha, one.prompt] = one
            case TextLogprob():
                self.texts[one.alpha, one.line] = one
            case Question():
                _keep(self.questions.setdefault(one.task, {}), one.alpha, one.question, one.correct)
            case Score() | Preference():
                kept = self._scores if isinstance(one, Score) else self._preferences
                if not _keep(kept.setdefault(one.reward, {}), one.alpha, one.prompt, one.value):
                    self._failed.add((one.alpha, "reward", one.prompt, one.reward))
            case Failure():
                self._failed.add((one.alpha, one.use, one.prompt, one.reward))

    def _scored(self) -> set[int]:
        return {prompt for kept in (self._scores, self._preferences) for cells in kept.values() for _, prompt in cells}

    @property
    def zero(self) -> int:
        """Index of alpha 0."""
        return self.alphas.index(0.0)

    def failures(self, alpha: float) -> int:
        """Return how many prompts, texts and questions failed; a score that is not finite is one of them."""
        return sum(failed[0] == alpha for failed in self._failed)

    def compares_only(self, reward: str) -> bool:
        """Return whether a reward is a judge's preference between an answer and the one at alpha 0."""
        return not self._scores.get(reward) and bool(self._preferences.get(reward))

    def rewards(self, reward: str) -> Cells[int]:
        """Return the scores of a reward; a judge that only compares scores an answer at alpha 0 with 0.5."""
        if not self.compares_only(reward):
            return self._scores.get(reward, {})
        cells = self._preferences[reward]
        compared = {prompt for _, prompt in cells}
        return {**cells, **{(0.0, prompt): NEUTRAL for prompt in compared}}

    def of_answers(self, values: Mapping[tuple[float, int], float]) -> Array:
        """Return numbers by prompt as a table; see :meth:`table`."""
        return self.table(values, self.prompts)

    def table(self, values: Mapping[tuple[float, Key], float], rows: Sequence[Key]) -> Array:
        """Return numbers as a table of the shape (rows, alphas), NaN where there is none."""
        row_of = {row: index for index, row in enumerate(rows)}
        column_of = {alpha: index for index, alpha in enumerate(self.alphas)}
        table = np.full((len(rows), len(self.alphas)), np.nan)
        for (alpha, row), value in values.items():
            if row in row_of:
                table[row_of[row], column_of[alpha]] = value
        return table

    def of_task(self, task: str) -> Array:
        """Return the scores of a task's questions, of the shape (questions, alphas), NaN where there is none."""
        cells = self.questions[task]
        return self.table(cells, sorted({question for _, question in cells}))


def _keep(cells: Cells[Key], alpha: float, key: Key, value: float) -> bool:
    """Keep a number if it is finite; return whether it is."""
    if not math.isfinite(value):
        return False
    cells[alpha, key] = value
    return True
