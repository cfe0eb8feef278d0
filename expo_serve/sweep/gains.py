"""What an alpha gains over alpha 0, with the length of the answers taken out of it or not."""

from __future__ import annotations

import numpy as np

from expo_serve.sweep.statistics import Array, Estimate, intercept, mean

LEAST_CONTROLLED = 8
"""Pairs from which length is controlled for: three coefficients, and five degrees of freedom for their errors."""
LEAST_PAIRS = 6
"""Pairs from which anything can be shown: five wins of five come by chance in 1 of 32 cases, more than 2.5%."""


def length_terms(length: Array, zero: int) -> Array:
    """Return what the difference in length may do to a reward: differences of the length and of its logarithm.

    Args:
        length: tokens, of the shape (prompts, alphas), NaN where there is no answer.
        zero: index of alpha 0.

    Returns:
        Terms of the shape (prompts, alphas, 2).
    """
    terms = np.stack([length, np.log(np.maximum(length, 1.0))], axis=2)
    return np.asarray(terms - terms[:, [zero]])


def with_length_control(gains: Array, terms: Array, weights: Array | None = None) -> Estimate:
    """Estimate what each alpha gains where its answers are as long as those at alpha 0.

    One regression for each alpha on its pairs with alpha 0,
    ``r_ia - r_i0 = m_a + b_a * x_ia + c_a * z_ia + e_ia``, where x and z are the differences of length and of its
    logarithm; estimated is ``m_a``. Without z this is the least-squares fit of
    ``r_ia = g_i + m_a + b * (len_ia - len_i0) / sd`` to one alpha and alpha 0. Why not to all alphas, with one b: in
    simulations of a reward that grows with length alone, 128 prompts, the lower bound of ``m_a`` was above 0, where it
    should be in 2.5% of the cases,

    * in 2.5% of them with one b, 54% where the reward grows with the logarithm of the length, 34% with its root, and
      in 30% (20 prompts) where larger alphas collapse into long bad answers, which turn b's sign;
    * in 2.5%, 20%, 11% and 2% with a b for each alpha;
    * in 2.5%, 3.5%, 2% and 2% with both terms; standard errors are 3% larger than with one.

    Args:
        gains: ``r_ia - r_i0``, of the shape (prompts, alphas); NaN where a pair is not complete.
        terms: of :func:`length_terms`.
        weights: how often each resample has each prompt, of the shape (resamples, prompts); each once by default.

    Returns:
        Estimates of the shape (resamples, alphas); the error is infinite with fewer than eight pairs.
    """
    every = [_of_one(gains[:, at], terms[:, at], weights) for at in range(gains.shape[1])]
    return Estimate(*(np.stack(part, axis=1) for part in zip(*every, strict=True)))


def _of_one(gains: Array, terms: Array, weights: Array | None) -> Estimate:
    found = intercept(gains, terms, weights)
    is_enough = found.freedom + 1 + terms.shape[1] >= LEAST_CONTROLLED
    return found._replace(error=np.where(is_enough, found.error, np.inf))


def without_length_control(gains: Array, weights: Array | None = None) -> Estimate:
    """Estimate the mean gain of each alpha.

    Args:
        gains: as for :func:`with_length_control`.
        weights: as for :func:`with_length_control`.

    Returns:
        Estimates of the shape (resamples, alphas); the error is infinite with fewer than six pairs.
    """
    found = mean(gains, weights)
    return found._replace(error=np.where(found.freedom + 1 >= LEAST_PAIRS, found.error, np.inf))
