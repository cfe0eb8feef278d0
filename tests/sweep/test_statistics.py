"""Estimates and their errors: against formulas, against repeated rows, and by simulation of what they cover."""

from __future__ import annotations

import numpy as np
import pytest

from expo_serve.sweep.statistics import (
    ONE_SIDED,
    TWO_SIDED,
    Array,
    Estimate,
    batches,
    intercept,
    mean,
    mean_of_bounded,
    pairs_needed,
    questions_needed,
    ratio,
    resampled,
    resampled_halves,
    rise_noticed,
    share_interval,
    t_quantile,
)

SIMULATIONS = 3000


def covered(estimate: Estimate, truth: float) -> float:
    """Share of the 95% intervals that cover the truth."""
    return float(np.mean((estimate.low() <= truth) & (truth <= estimate.high())))


@pytest.mark.parametrize(
    ("quantile", "freedom", "expected"),
    [
        (0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 3, 3.1824), (0.975, 5, 2.5706), (0.975, 19, 2.0930),
        (0.975, 127, 1.9788), (0.975, np.inf, 1.9600), (0.95, 1, 6.3138), (0.95, 3, 2.3534), (0.95, 30, 1.6973),
    ],
)  # fmt: skip
def test_quantiles_of_t_are_those_of_the_tables(quantile: float, freedom: float, expected: float) -> None:
    assert t_quantile(quantile, np.array([freedom]))[0] == pytest.approx(expected, abs=0.004)


def test_mean_by_hand() -> None:
    found = mean(np.array([[1.0, np.nan], [2.0, 5.0], [6.0, np.nan]]))
    assert found.value[0] == pytest.approx([3.0, 5.0])
    assert found.error[0, 0] == pytest.approx(np.std([1, 2, 6], ddof=1) / 3**0.5)
    assert found.error[0, 1] == np.inf
    assert found.freedom[0].tolist() == [2, 0]
    assert found.low()[0, 1] == -np.inf


def test_weights_count_like_repeated_rows() -> None:
    rng = np.random.default_rng(0)
    values, terms = rng.normal(size=(12, 2)), rng.normal(size=(12, 2))
    values[3, 1] = np.nan
    weights = rng.integers(0, 4, (3, 12)).astype(float)
    for at, row in enumerate(weights.astype(int)):
        again = np.repeat(np.arange(12), row)
        for estimate in (mean, mean_of_bounded):
            found, expected = estimate(values, weights), estimate(values[again])
            assert found.value[at] == pytest.approx(expected.value[0])
            assert found.error[at] == pytest.approx(expected.error[0])
        of_weights, of_rows = intercept(values[:, 1], terms, weights), intercept(values[again, 1], terms[again])
        assert of_weights.value[at] == pytest.approx(of_rows.value[0])
        assert of_weights.error[at] == pytest.approx(of_rows.error[0])
        assert of_weights.freedom[at] == of_rows.freedom[0]


def test_mean_keeps_small_differences_between_large_values() -> None:
    values = 1e9 + np.array([[0.0], [1.0], [2.0]])
    assert mean(values).error[0, 0] == pytest.approx(1 / 3**0.5, rel=1e-6)


def test_mean_of_nothing() -> None:
    found = mean(np.full((3, 1), np.nan))
    assert np.isnan(found.value[0, 0])
    assert found.error[0, 0] == np.inf
    assert mean(np.zeros((0, 2))).error.tolist() == [[np.inf, np.inf]]


def test_bounded_mean_is_that_of_bonett_and_price() -> None:
    lost, won, count = 7, 2, 50
    values = np.array([-1.0] * lost + [1.0] * won + [0.0] * (count - lost - won))[:, None]
    shares = (won + 1) / (count + 2), (lost + 1) / (count + 2)
    found = mean_of_bounded(values)
    assert found.value[0, 0] == pytest.approx(shares[0] - shares[1])
    error = ((sum(shares) - (shares[0] - shares[1]) ** 2) / (count + 2)) ** 0.5
    assert found.error[0, 0] == pytest.approx(error)
    assert found.freedom[0, 0] == np.inf


def test_intercept_is_that_of_least_squares_with_hc3() -> None:
    rng = np.random.default_rng(1)
    terms = rng.normal(3, 2, (30, 2)) * [100, 1]
    values = 0.7 + terms @ [0.01, -0.5] + rng.normal(size=30)
    design = np.column_stack([np.ones(30), terms])
    slopes = np.linalg.lstsq(design, values, rcond=None)[0]
    inverse = np.linalg.inv(design.T @ design)
    leverage = np.diag(design @ inverse @ design.T)
    residuals = (values - design @ slopes) / (1 - leverage)
    covariance = inverse @ design.T @ np.diag(residuals**2) @ design @ inverse
    found = intercept(values, terms)
    assert found.value[0] == pytest.approx(slopes[0])
    assert found.error[0] == pytest.approx(covariance[0, 0] ** 0.5)
    assert found.freedom[0] == 27


def test_intercept_without_a_difference_in_length_is_the_mean() -> None:
    values = np.random.default_rng(2).normal(size=20)
    assert intercept(values, np.zeros((20, 2))).value[0] == pytest.approx(values.mean())


def test_intercept_that_cannot_be_told_from_a_term_is_not_known() -> None:
    values = np.random.default_rng(3).normal(1, 1, 20)
    assert intercept(values, np.full((20, 1), 25.0)).error[0] == np.inf
    assert intercept(values[:2], np.ones((2, 2))).error[0] == np.inf


def test_rounding_is_not_taken_for_an_effect() -> None:
    terms = np.random.default_rng(4).normal(30, 20, (40, 1))
    found = intercept(0.1 * terms[:, 0], terms)
    assert abs(found.value[0]) < 1e-9
    assert not found.low()[0] > 0
    assert not found.high()[0] < 0


def test_ratio_of_sums() -> None:
    above, below = np.array([1.0, 4.0, np.nan, 1.0]), np.array([2.0, 2.0, 5.0, 4.0])
    found = ratio(above, below)
    assert found.value[0] == pytest.approx(6 / 8)
    residuals = np.array([1 - 1.5, 4 - 1.5, 1 - 3.0])
    assert found.error[0] == pytest.approx((3 * residuals.var(ddof=1)) ** 0.5 / 8)
    assert ratio(np.zeros(2), np.zeros(2)).error[0] == np.inf


@pytest.mark.parametrize(("hits", "low", "high"), [(0, 0.0, 0.1611), (10, 0.2993, 0.7007), (20, 0.8389, 1.0)])
def test_interval_of_a_share_is_wilsons(hits: int, low: float, high: float) -> None:
    assert share_interval(hits, 20) == pytest.approx((low, high), abs=1e-4)


def test_sizes_that_claims_need() -> None:
    assert questions_needed(0.2, 0.05) == pytest.approx(495, abs=1)
    assert questions_needed(0.1, 0.02) == pytest.approx(1546, abs=1)
    assert pairs_needed(2.0, 1.0) == pytest.approx(31.4, abs=0.05)


def test_questions_needed_show_it_in_four_of_five_cases() -> None:
    rng = np.random.default_rng(5)
    count = int(questions_needed(0.2, 0.05))
    answers = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.8, 0.1], size=(count, SIMULATIONS))
    shown = mean_of_bounded(answers).low(ONE_SIDED) > -0.05
    assert np.mean(shown) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("count", [20, 40, 256])
def test_rises_are_noticed_in_four_of_five_cases(count: int) -> None:
    rng = np.random.default_rng(count)
    seen = mean((rng.random((count, SIMULATIONS)) < rise_noticed(count, 0.05)).astype(float))
    assert np.mean((seen.low() > 0) & (seen.value > 0.05)) == pytest.approx(0.8, abs=0.07)


def draws(kind: str, count: int, rng: np.random.Generator) -> Array:
    """Differences with mean 0, of the shape (count, simulations)."""
    shape = count, SIMULATIONS
    match kind:
        case "normal":
            return rng.normal(size=shape)
        case "heavy tails":
            return rng.standard_t(3, shape)
        case "preferences":
            return rng.choice([-0.5, 0.0, 0.5], p=[0.35, 0.3, 0.35], size=shape)
    return rng.gamma(4.0, size=shape) - 4


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "preferences", "skewed"])
@pytest.mark.parametrize("count", [10, 20, 64, 128])
def test_intervals_of_means_cover(kind: str, count: int) -> None:
    assert covered(mean(draws(kind, count, np.random.default_rng(count))), 0) == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize("share", [0.05, 0.3])
@pytest.mark.parametrize("count", [20, 256])
def test_intervals_of_shares_cover(share: float, count: int) -> None:
    hits = np.random.default_rng(count).binomial(count, share, SIMULATIONS)
    intervals = {hit: share_interval(hit, count) for hit in set(hits.tolist())}
    inside = [intervals[hit][0] <= share <= intervals[hit][1] for hit in hits.tolist()]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.04)


@pytest.mark.parametrize(("count", "lost", "won"), [(100, 0.03, 0.01), (500, 0.06, 0.04), (500, 0.1, 0.1)])
def test_intervals_of_changes_of_a_capability_cover(count: int, lost: float, won: float) -> None:
    rng = np.random.default_rng(count)
    answers = rng.choice([-1.0, 0.0, 1.0], p=[lost, 1 - lost - won, won], size=(count, SIMULATIONS))
    assert covered(mean_of_bounded(answers), won - lost) == pytest.approx(0.96, abs=0.03)


def test_loss_at_the_margin_passes_in_one_of_twenty_cases() -> None:
    rng = np.random.default_rng(7)
    answers = rng.choice([-1.0, 0.0, 1.0], p=[0.06, 0.9, 0.04], size=(1319, SIMULATIONS))
    assert np.mean(mean_of_bounded(answers).low(ONE_SIDED) > -0.02) == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize("count", [12, 20, 64])
@pytest.mark.parametrize("kind", ["even", "growing scatter", "preferences"])
def test_intervals_of_intercepts_cover(kind: str, count: int) -> None:
    """A reward that grows with the length and its logarithm, and answers that are longer on average."""
    rng = np.random.default_rng(count)
    estimates = []
    for _ in range(800):
        lengths = rng.lognormal(4.5, 0.4, (count, 1)) * np.exp(rng.normal([0, 0.25], 0.3, (count, 2)))
        both = np.stack([lengths, np.log(lengths)], axis=2)
        terms = both[:, 1] - both[:, 0]
        scatter = 0.3 + 2 * np.abs(terms[:, 1]) if kind == "growing scatter" else 1.0
        values = terms @ [0.005, 0.5] + scatter * rng.normal(0, 0.6, count)
        if kind == "preferences":
            values = np.sign(rng.normal(0, 1, count)) / 2
        estimates.append(intercept(values, terms))
    joined = Estimate(*(np.concatenate(part) for part in zip(*estimates, strict=True)))
    assert covered(joined, 0) == pytest.approx(0.955, abs=0.03)


@pytest.mark.parametrize("count", [20, 128])
def test_intervals_of_ratios_cover(count: int) -> None:
    rng = np.random.default_rng(count)
    estimates = []
    for _ in range(1500):
        tokens = np.round(rng.lognormal(4.5, 0.5, count))
        estimates.append(ratio(tokens * rng.gamma(6, 0.05 / 6, count), tokens))
    joined = Estimate(*(np.concatenate(part) for part in zip(*estimates, strict=True)))
    assert covered(joined, 0.05) == pytest.approx(0.94, abs=0.03)


def test_resamples_draw_as_many_as_there_are() -> None:
    drawn = resampled(np.random.default_rng(8), 50, 2000)
    assert drawn.sum(axis=1).tolist() == [50] * 2000
    assert np.allclose(drawn.mean(axis=0), 1, atol=0.15)
    assert drawn.var() == pytest.approx(1 - 1 / 50, abs=0.03)


@pytest.mark.parametrize("count", [0, 1, 2, 9, 40])
def test_halves_share_no_observation(count: int) -> None:
    first, second = resampled_halves(np.random.default_rng(9), count, 300)
    assert not np.any((first > 0) & (second > 0))
    assert set(first.sum(axis=1).tolist()) == {count // 2}
    assert set(second.sum(axis=1).tolist()) == {count - count // 2}
    if count > 2:
        assert np.all((first > 0).any(axis=0))
        assert np.all((second > 0).any(axis=0))


def test_batches_add_up() -> None:
    assert sum(batches(2000, 14_000)) == 2000
    assert max(batches(2000, 14_000)) * 14_000 < 3e6
    assert list(batches(0, 10)) == []
    assert TWO_SIDED > ONE_SIDED
