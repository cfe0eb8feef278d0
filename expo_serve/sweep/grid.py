"""Which alphas a sweep tries: a list that is given, or a search that goes on from what was found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from expo_serve.config import MAX_ALPHA, parse_alpha
from expo_serve.errors import UsageError

if TYPE_CHECKING:
    from expo_serve.sweep.judgement import Judgement

DEFAULT_ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0)
"""ExPO's authors tried 0.1 to 0.5 on published pairs (arXiv 2404.16792, Table 7); collapses are seen beyond."""
AUTO = "auto"
_FIRST = 0.1
_ROW = 2
"""So many alphas in a row that fail end the doubling: one may fail by chance, or the alpha after a bad one be good."""
_AROUND = (0.75, 1.25, 1.5)
"""Of the best alpha: between its neighbours, which are half of it and twice it."""
_BEYOND = (1.25, 1.5, 1.75)
"""Of the last alpha that does not fail: between it and the next one, which does."""
_BELOW = (0.25, 0.5, 0.75)
"""Of the first alpha, where all fail."""


def parse_alphas(given: object) -> tuple[float, ...] | None:
    """Read ``--alphas``: numbers, separated by commas or in a list; adds 0, sorts, and drops what is there twice.

    Args:
        given: None for the default grid.

    Returns:
        The alphas, rising; None for ``auto``.

    Raises:
        UsageError: one is not an alpha.
    """
    if given is None:
        return DEFAULT_ALPHAS
    if isinstance(given, str) and given.strip() == AUTO:
        return None
    parts: Iterable[object] = given.split(",") if isinstance(given, str) else _listed(given)
    try:
        return tuple(sorted({0.0, *(parse_alpha(part) + 0.0 for part in parts)}))
    except ValueError as error:
        raise UsageError(f"--alphas: expected {AUTO}, or numbers such as 0,0.1,0.3: {error}") from None


def _listed(given: object) -> Iterable[object]:
    return given if isinstance(given, Sequence) else [given]


class AutoGrid:
    """Searches for alphas: doubles from 0.1 until two in a row fail, then tries three points around the best.

    An alpha fails if it is not feasible, or if its reward is lower than that of alpha 0 (its whole 95% interval on the
    selection half). This is the search by hand of ExPO's authors (arXiv 2404.16792, Appendix B), automated. What comes
    next follows from what was judged alone, so a search that was interrupted goes on where it was.
    """

    def next(self, judgement: Judgement) -> float | None:
        """Return the alpha to try next; None where the search is over.

        Args:
            judgement: of all alphas tried so far.
        """
        tried = {one.alpha for one in judgement.alphas}
        alpha, doubled, failed = _FIRST, list[float](), 0
        while failed < _ROW and alpha <= MAX_ALPHA:
            if alpha not in tried:
                return alpha
            doubled.append(alpha)
            failed = failed + 1 if _fails(judgement, alpha) else 0
            alpha *= 2
        return next((point for point in _refined(judgement, doubled) if point not in tried), None)


def _fails(judgement: Judgement, alpha: float) -> bool:
    gain = judgement.gains.get(alpha)
    return not _is_feasible(judgement, alpha) or (gain is not None and gain.high is not None and gain.high < 0)


def _is_feasible(judgement: Judgement, alpha: float) -> bool:
    return any(one.alpha == alpha and one.feasible for one in judgement.alphas)


def _refined(judgement: Judgement, doubled: Sequence[float]) -> list[float]:
    """Return points around the best of the doubled alphas; without a reward, between the last feasible and the next.

    Points that were tried since do not count: they would move the points.
    """
    left = [alpha for alpha in doubled if not _fails(judgement, alpha)]
    if not left:
        return _times(_FIRST, _BELOW)
    gains = {alpha: gain for alpha in left if (gain := _gain(judgement, alpha)) is not None}
    if not gains:
        return _times(left[-1], _BEYOND)
    return _times(max(gains, key=lambda alpha: gains[alpha]), _AROUND)


def _gain(judgement: Judgement, alpha: float) -> float | None:
    return judgement.gains[alpha].value if alpha in judgement.gains else None


def _times(alpha: float, factors: Iterable[float]) -> list[float]:
    """Return multiples, with two significant digits."""
    points = (float(f"{alpha * factor:.2g}") for factor in factors)
    return [point for point in points if point <= MAX_ALPHA]
