"""Estimates with their errors, many at once: each row of weights counts the observations of one resample.

Which interval: in simulations with 10 to 128 pairs of normal, heavy-tailed and three-valued differences, 95% intervals
by Student's t covered in 94 to 97% of the cases, those by percentiles of the bootstrap in 89 to 95%.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
TWO_SIDED = 0.975
"""Quantile of a two-sided 95% interval."""
ONE_SIDED = 0.95
_POWER = 0.8
_ROUNDING = 1e-12
"""No error of a mean is smaller than this share of the values' size: else rounding would be taken for an effect."""
_ROUNDING_OF_FITS = 1e-9
"""The same for a regression, which rounds more."""
_CELLS = 1 << 21
"""Weights that are held at once."""


class Estimate(NamedTuple):
    """Estimates of one shape; their error is infinite where nothing can be said."""

    value: Array
    error: Array
    """Standard error."""
    freedom: Array
    """Degrees of freedom of the t distribution; infinite for the normal one."""

    def low(self, quantile: float = TWO_SIDED) -> Array:
        """Return the lower bound."""
        return self.value - self._reach(quantile)

    def high(self, quantile: float = TWO_SIDED) -> Array:
        """Return the upper bound."""
        return self.value + self._reach(quantile)

    def _reach(self, quantile: float) -> Array:
        return np.asarray(t_quantile(quantile, self.freedom) * self.error)


def normal_quantile(quantile: float) -> float:
    """Return the quantile of the standard normal distribution."""
    return NormalDist().inv_cdf(quantile)


def t_quantile(quantile: float, freedom: Array) -> Array:
    """Return quantiles of Student's t.

    Exact for 1 and 2 degrees of freedom; from 3 on by the expansion of Abramowitz and Stegun, 26.7.5, which is off by
    less than 0.004 for the quantiles that are used here. Below 1 it is that of 1.

    Args:
        quantile: between 0 and 1.
        freedom: degrees of freedom, whole numbers or infinity.
    """
    z = normal_quantile(quantile)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    inverse = 1 / np.maximum(freedom, 1.0)
    found = z + sum(term * inverse**power for power, term in enumerate(terms, 1))
    found = np.where(freedom < 2.5, (2 * quantile - 1) / np.sqrt(2 * quantile * (1 - quantile)), found)
    return np.where(freedom < 1.5, np.tan(np.pi * (quantile - 0.5)), found)


def mean(values: Array, weights: Array | None = None) -> Estimate:
    """Estimate the mean of each column.

    Args:
        values: rows of observations, columns of what is observed; NaN where it is missing.
        weights: how often each resample has each row, of shape (resamples, rows); each row once by default.

    Returns:
        Estimates of shape (resamples, columns).
    """
    return _mean(values, weights, extra=0)


def mean_of_bounded(values: Array, weights: Array | None = None) -> Estimate:
    """Estimate the mean of differences that are from -1 to 1, mostly 0: as if a -1 and a 1 had been seen too.

    For differences of paired zeros and ones this is the adjusted Wald interval of Bonett and Price (2012, Journal of
    Educational and Behavioral Statistics 37:479-488). Without the two, no difference among few pairs would be taken for
    proof that there is none: in a simulation with 100 questions, a true loss of 2 pp passed as smaller than that in 13%
    of the cases, here in 0 to 5%.

    Args:
        values: as for :func:`mean`.
        weights: as for :func:`mean`.

    Returns:
        Estimates of shape (resamples, columns).
    """
    return _mean(values, weights, extra=2)


def _mean(values: Array, weights: Array | None, extra: int) -> Estimate:
    rows = np.ones((1, len(values))) if weights is None else weights
    there = np.isfinite(values)
    # Sums of squares about a point near the mean: about 0, large values would lose their small differences.
    centre = np.zeros(values.shape[1]) if extra else _column_means(values, there)
    shifted = np.where(there, values - centre, 0.0)
    count, total, squares = rows @ there, rows @ shifted, rows @ shifted**2 + extra
    all_count = count + extra
    with np.errstate(divide="ignore", invalid="ignore"):
        average = total / all_count
        spread = np.maximum(squares - total * average, 0.0)
        variance = spread / all_count**2 if extra else spread / (count * (count - 1))
    size = np.sqrt(np.mean(np.where(there, values, 0.0) ** 2, axis=0)) if len(values) else 0.0
    error = np.maximum(np.sqrt(variance), _ROUNDING * size)
    known = count > (0 if extra else 1)
    freedom = np.full_like(count, np.inf) if extra else np.maximum(count - 1, 0.0)
    return Estimate(np.where(count > 0, average + centre, np.nan), np.where(known, error, np.inf), freedom)


def _column_means(values: Array, there: Flags) -> Array:
    return np.asarray(np.where(there, values, 0.0).sum(axis=0) / np.maximum(there.sum(axis=0), 1))


def intercept(values: Array, terms: Array, weights: Array | None = None) -> Estimate:
    """Estimate what is left of the mean of ``values`` when all ``terms`` are 0: the intercept of a regression.

    The errors are those of MacKinnon and White (1985, Journal of Econometrics 29:305-325), called HC3: they hold too
    where the scatter grows with the terms, and for three-valued differences, of which the usual errors make 3 to 4%
    false gains in place of 2.5%.

    Args:
        values: one for each observation; NaN where it is missing.
        terms: of shape (observations, terms), NaN where they are missing.
        weights: as for :func:`mean`.

    Returns:
        Estimates of shape (resamples,). The error is infinite where the intercept cannot be told from the terms.
    """
    there = np.isfinite(values) & np.isfinite(terms).all(axis=1)
    rows = (np.ones((1, len(values))) if weights is None else weights)[:, there]
    seen = values[there]
    design = np.column_stack([np.ones(len(seen)), _scaled(terms[there])])
    size = design.shape[1]
    products = (design[:, :, None] * design[:, None, :]).reshape(len(seen), size * size)
    squares = (rows @ products).reshape(-1, size, size)
    inverse = np.linalg.pinv(squares, rcond=1e-10, hermitian=True)
    slopes = np.einsum("bij,bj->bi", inverse, rows @ (design * seen[:, None]))
    leverage = inverse.reshape(-1, size * size) @ products.T
    residuals = (seen - slopes @ design.T) / np.maximum(1 - leverage, _ROUNDING_OF_FITS)
    error = np.sqrt(np.sum(rows * (residuals * (inverse[:, 0] @ design.T)) ** 2, axis=1))
    floor = _ROUNDING_OF_FITS * np.sqrt(np.mean(seen**2)) if len(seen) else 0.0
    freedom = rows.sum(axis=1) - size
    is_known = (freedom >= 1) & (np.einsum("bi,bi->b", inverse[:, 0], squares[:, :, 0]) > 1 - 1e-6)
    return Estimate(slopes[:, 0], np.where(is_known, np.maximum(error, floor), np.inf), np.maximum(freedom, 0.0))


def _scaled(terms: Array) -> Array:
    """Return terms of about one size, for the numerical rank; their zeros stay."""
    sizes = np.sqrt(np.mean(terms**2, axis=0)) if len(terms) else np.ones(terms.shape[1])
    return np.asarray(terms / np.where(sizes > 0, sizes, 1.0))


def ratio(numerators: Array, denominators: Array) -> Estimate:
    """Estimate the ratio of two sums over clusters, such as a mean over tokens with answers as clusters.

    By linearisation: Cochran (1977), Sampling Techniques, 6.3.

    Args:
        numerators: one for each cluster; NaN where it is missing.
        denominators: likewise, none negative.

    Returns:
        An estimate of shape (1,).
    """
    there = np.isfinite(numerators) & np.isfinite(denominators)
    above, below = numerators[there], denominators[there]
    total = below.sum()
    if total <= 0:
        return Estimate(np.array([np.nan]), np.array([np.inf]), np.zeros(1))
    value = above.sum() / total
    scatter = mean((above - value * below)[:, None])
    return Estimate(np.array([value]), scatter.error[0] * len(below) / total, scatter.freedom[0])


def share_interval(hits: int, count: int) -> tuple[float, float]:
    """Return the 95% interval of a share by Wilson (1927, Journal of the American Statistical Association 22:209-212).

    It is of use with few observations too: 0 hits are no proof of a share of 0.
    """
    reach = normal_quantile(TWO_SIDED)
    return max(0.0, _wilson(hits / count, count, -reach)), min(1.0, _wilson(hits / count, count, reach))


def _wilson(share: float, count: int, reach: float) -> float:
    """Return the true share of which ``share`` is ``reach`` standard errors away; above it where that is positive."""
    root = math.sqrt(share * (1 - share) / count + reach**2 / (4 * count**2))
    return (share + reach**2 / (2 * count) + reach * root) / (1 + reach**2 / count)


def pairs_needed(deviation: float, difference: float) -> float:
    """Return how many pairs show a difference, two-sided at 5%, in 80% of all tries.

    ``((z_0.975 + z_0.8) * deviation / difference) ** 2``, for example Chow, Shao and Wang (2008), Sample Size
    Calculations in Clinical Research, 3.1.

    Args:
        deviation: standard deviation of the paired differences.
        difference: to be shown, not 0.
    """
    return ((normal_quantile(TWO_SIDED) + normal_quantile(_POWER)) * deviation / difference) ** 2


def questions_needed(discordant: float, margin: float) -> float:
    """Return how many paired questions show, one-sided at 5%, in 80% of all tries, that a loss is below a margin.

    ``(z_0.95 + z_0.8) ** 2 * discordant / margin ** 2`` where there is no loss: Lu and Bean (1995), On the sample size
    for one-sided equivalence of sensitivities based upon McNemar's test, Statistics in Medicine 14:1831-1839.

    Args:
        discordant: share of the questions that one side answers and the other does not.
        margin: not 0.
    """
    return (normal_quantile(ONE_SIDED) + normal_quantile(_POWER)) ** 2 * discordant / margin**2


def rise_noticed(count: int, margin: float) -> float:
    """Return from which rise of a share on, from 0, ``count`` pairs show that it is above 0 and over a margin.

    They do in 80% of all tries. A rise seen as ``s`` is shown to be above 0 where ``s`` is more than t times its
    standard error ``sqrt(s * (1 - s) / (count - 1))``; then Wilson's bound.
    """
    square = float(t_quantile(TWO_SIDED, np.array(count - 1.0))) ** 2
    return _wilson(max(margin, square / (count - 1 + square)), count, normal_quantile(_POWER))


def resampled(rng: np.random.Generator, count: int, resamples: int) -> Array:
    """Draw resamples with replacement.

    Args:
        rng: the source of randomness.
        count: observations.
        resamples: how many times to draw ``count`` of them.

    Returns:
        How often each resample has each observation, of shape (resamples, count).
    """
    return _counts(rng.integers(0, max(count, 1), (resamples, count)), count)


def resampled_halves(rng: np.random.Generator, count: int, resamples: int) -> tuple[Array, Array]:
    """Split observations at random, anew each time, and draw as many from each half with replacement.

    No observation is in both: what one half has chosen is tested on observations that it has not seen.

    Args:
        rng: the source of randomness.
        count: observations; an odd one more falls into the second half.
        resamples: how many times.

    Returns:
        Counts of shape (resamples, count) for each half.
    """
    order = rng.permuted(np.tile(np.arange(count), (resamples, 1)), axis=1)
    first, second = order[:, : count // 2], order[:, count // 2 :]
    return _counts(_redrawn(rng, first), count), _counts(_redrawn(rng, second), count)


def _redrawn(rng: np.random.Generator, pool: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    size = pool.shape[1]
    return np.take_along_axis(pool, rng.integers(0, max(size, 1), pool.shape), axis=1)


def _counts(drawn: npt.NDArray[np.int64], count: int) -> Array:
    resamples = len(drawn)
    cells = (drawn + count * np.arange(resamples)[:, None]).ravel()
    return np.bincount(cells, minlength=resamples * count).reshape(resamples, count).astype(np.float64)


def batches(resamples: int, rows: int) -> Iterator[int]:
    """Yield sizes of batches that add up to ``resamples``, so that weights of ``rows`` columns fit into memory."""
    size = max(1, _CELLS // max(rows, 1))
    for start in range(0, resamples, size):
        yield min(size, resamples - start)
