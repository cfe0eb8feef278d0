"""Measures of single answers: how long they are, whether they end, whether they repeat themselves."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from expo_serve.sweep.measures.measure import Measure, Series, means, shares
from expo_serve.sweep.observations import Answer
from expo_serve.sweep.observed import Cells, Observed
from expo_serve.sweep.results import MeasureInfo

_GRAM = 4
_CACHED = 1 << 16
"""Answers whose longest repeat is kept: ``auto`` asks again after each alpha."""


class Length(Measure):
    """Tokens of an answer, the end mark with them; the mean over answers.

    Its jump is how ExPO's authors recognise an alpha that is too large (arXiv 2404.16792, Figure 4).
    """

    name = "length"

    def series(self, observed: Observed, rewards: Sequence[str]) -> Iterator[Series]:
        info = MeasureInfo(label="Length", unit="tokens", better="", formula="mean number of tokens of an answer")
        values = lengths(observed)
        if values:
            yield Series(self.name, info, means(observed, values), values)


class Unfinished(Measure):
    """Share of the answers that were cut at the limit of tokens: ``finish_reason == "length"``.

    The interval is Wilson's. Source: as for :class:`Length`.
    """

    name = "unfinished"

    def series(self, observed: Observed, rewards: Sequence[str]) -> Iterator[Series]:
        info = MeasureInfo(
            label="Unfinished answers",
            unit="share",
            better="lower",
            formula="share of the answers that were cut at the limit of tokens",
        )
        values = unfinished(observed)
        if values:
            yield Series(self.name, info, shares(observed, observed.of_answers(values)), values)


class Distinct4(Measure):
    """Distinct 4-grams of an answer over all of its 4-grams; the mean over answers.

    Distinct-n of Li et al. (2016, arXiv 1510.03055), for each answer; 1 minus it is seq-rep-n of Welleck et al. (2020,
    arXiv 1908.04319). Of token ids, not of words: every language has tokens, and they are the same at every alpha. An
    answer of fewer than four tokens repeats nothing and has 1.
    """

    name = "distinct_4"

    def series(self, observed: Observed, rewards: Sequence[str]) -> Iterator[Series]:
        info = MeasureInfo(
            label="Distinct 4-grams",
            unit="share",
            better="higher",
            formula="distinct 4-grams of token ids / all 4-grams, mean over answers",
        )
        values = {key: 1 - share for key, share in repetition(observed).items()}
        if values:
            yield Series(self.name, info, means(observed, values), values)


class LongestRepeat(Measure):
    """Tokens of the longest sequence that occurs twice in an answer, overlaps allowed; the mean over answers.

    The longest repeated substring. A loop is as long as its answer, less one turn.
    """

    name = "longest_repeat"

    def series(self, observed: Observed, rewards: Sequence[str]) -> Iterator[Series]:
        info = MeasureInfo(
            label="Longest repeat",
            unit="tokens",
            better="lower",
            formula="tokens of the longest sequence that occurs twice in an answer, mean over answers",
        )
        values = _of_each(observed, lambda answer: float(longest_repeat(answer.tokens)))
        if values:
            yield Series(self.name, info, means(observed, values), values)


class Compression(Measure):
    """Bytes of an answer's text in UTF-8 over its bytes after DEFLATE (zlib, level 9); the mean over answers.

    The compression ratio of Shaib et al. (2024, arXiv 2403.00553). Longer texts have a larger one, so it is to be read
    beside the length. Empty answers have none.
    """

    name = "compression"

    def series(self, observed: Observed, rewards: Sequence[str]) -> Iterator[Series]:
        info = MeasureInfo(
            label="Compression ratio",
            unit="",
            better="lower",
            formula="bytes of an answer / bytes after DEFLATE, mean over answers",
        )
        values = _of_each(observed, _compression)
        if values:
            yield Series(self.name, info, means(observed, values), values)


def lengths(observed: Observed) -> Cells[int]:
    """Return the number of tokens of each answer."""
    return _of_each(observed, lambda answer: float(len(answer.tokens)))


def unfinished(observed: Observed) -> Cells[int]:
    """Return 1 for each answer that was cut at the limit of tokens, else 0."""
    return _of_each(observed, lambda answer: float(answer.finish_reason == "length"))


def repetition(observed: Observed) -> Cells[int]:
    """Return for each answer the share of its 4-grams that were there before: 1 - distinct-4."""
    return _of_each(observed, lambda answer: _repetition(answer.tokens))


@lru_cache(_CACHED)
def longest_repeat(tokens: tuple[int, ...]) -> int:
    """Return the length of the longest sequence that occurs at least twice; the two may overlap.

    By doubling (Karp, Miller and Rosenberg, 1972): sequences of length 2k are told apart by the ranks of their halves
    of length k; then the length is put together from powers of two, the largest first.

    Args:
        tokens: token ids of one answer.
    """
    ranks = [_ranks(np.array(tokens, dtype=np.int64))]
    while _has_twice(ranks[-1]) and len(ranks[-1]) > (half := 1 << (len(ranks) - 1)):
        ranks.append(_joined(ranks[-1], ranks[-1], half))
    found, current = 0, np.zeros(len(tokens) + 1, dtype=np.int64)
    for power in range(len(ranks) - 1, -1, -1):
        longer = _joined(current, ranks[power], found)
        if _has_twice(longer):
            found, current = found + (1 << power), longer
    return found


def _joined(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], offset: int) -> npt.NDArray[np.int64]:
    """Return ranks of the sequences that begin with one of ``first`` and go on, ``offset`` later, with ``second``."""
    following = second[offset:]
    count = min(len(first), len(following))
    return _ranks(first[:count] * (len(second) + 1) + following[:count])


def _ranks(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.unique(values, return_inverse=True)[1].reshape(-1)


def _has_twice(ranks: npt.NDArray[np.int64]) -> bool:
    return len(ranks) > 0 and int(ranks.max()) + 1 < len(ranks)


def _repetition(tokens: Sequence[int]) -> float:
    grams = list(zip(*(tokens[start:] for start in range(_GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _compression(answer: Answer) -> float | None:
    text = answer.text.encode("utf-8", "surrogatepass")
    return len(text) / len(zlib.compress(text, 9)) if text else None


def _of_each(observed: Observed, measure: Callable[[Answer], float | None]) -> Cells[int]:
    found = ((key, measure(answer)) for key, answer in observed.answers.items())
    return {key: value for key, value in found if value is not None}
