"""Which alphas are tried: those that are given, and the search."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from expo_serve.config import MAX_ALPHA
from expo_serve.errors import UsageError
from expo_serve.sweep.grid import DEFAULT_ALPHAS, AutoGrid, parse_alphas
from expo_serve.sweep.judgement import Judgement, RuleSettings, judge
from expo_serve.sweep.results import AlphaResult, Decision, Measured
from tests.sweep.planted import REWARD, Planted, observations


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0,0.1,0.5", (0, 0.1, 0.5)),
        ("0.5, 0.1", (0, 0.1, 0.5)),
        ("1,1.0,1e0,-0", (0, 1)),
        ("-0.5,2", (-0.5, 0, 2)),
        ("1000", (0, 1000)),
        (0.3, (0, 0.3)),
        ([0.2, "0.1", 1], (0, 0.1, 0.2, 1)),
        (None, DEFAULT_ALPHAS),
    ],
)
def test_alphas_that_are_given(given: object, expected: tuple[float, ...]) -> None:
    found = parse_alphas(given)
    assert found == expected
    assert "-0.0" not in str(found)


def test_auto() -> None:
    assert parse_alphas("auto") is None
    assert parse_alphas(" auto ") is None


@pytest.mark.parametrize("given", ["", "0,,1", "a", "0,1;2", "10001", "nan", "0.1 0.2", [True], {"a": 1}])
def test_what_is_no_alpha_is_refused(given: object) -> None:
    with pytest.raises(UsageError, match=r"^--alphas: expected auto, or numbers such as 0,0\.1,0\.3: alpha must be"):
        parse_alphas(given)


def judgement(
    alphas: list[float], is_feasible: Callable[[float], bool], gain: Callable[[float], float] | None = None
) -> Judgement:
    """A judgement in which all that the search looks at is planted; half the width of intervals is 0.1."""
    results = [
        AlphaResult(
            alpha=alpha, effective_alpha=alpha, reward=None, kl=None, feasible=is_feasible(alpha),
            infeasible_because=[], measures={}, failures=0, deployment_id="", load_seconds=1, generate_seconds=1,
        )
        for alpha in sorted(alphas)
    ]  # fmt: skip
    gains = {}
    if gain is not None:
        gains = {a: Measured(value=gain(a), low=gain(a) - 0.1, high=gain(a) + 0.1, n=9) for a in alphas}
    decision = Decision(kind="zero", reason="", feasible=[])
    return Judgement(results, decision, measures={}, samples=[], recommendation=0.0, gains=gains)


def search(is_feasible: Callable[[float], bool], gain: Callable[[float], float] | None = None) -> list[float]:
    """The alphas of a whole search, in the order in which they are tried."""
    tried = [0.0]
    while (alpha := AutoGrid().next(judgement(tried, is_feasible, gain))) is not None:
        assert alpha not in tried
        tried.append(alpha)
        assert len(tried) < 40
    return tried


def test_search_doubles_until_two_fail_and_refines_around_the_best() -> None:
    found = search(lambda alpha: alpha < 1, lambda alpha: 1 - (alpha - 0.45) ** 2)
    assert found == [0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 0.3, 0.5, 0.6]


def test_search_without_a_reward_looks_between_the_last_feasible_alpha_and_the_next() -> None:
    assert search(lambda alpha: alpha < 0.5) == [0, 0.1, 0.2, 0.4, 0.8, 1.6, 0.5, 0.6, 0.7]


def test_search_below_the_first_alpha() -> None:
    assert search(lambda alpha: alpha < 0.09) == [0, 0.1, 0.2, 0.025, 0.05, 0.075]


def test_alpha_with_a_lower_reward_fails() -> None:
    found = search(lambda alpha: True, lambda alpha: 0.5 - alpha)
    assert found == [0, 0.1, 0.2, 0.4, 0.8, 1.6, 0.075, 0.12, 0.15]
    assert search(lambda alpha: True, lambda alpha: -1.0) == [0, 0.1, 0.2, 0.025, 0.05, 0.075]


def test_one_alpha_that_fails_does_not_end_the_search() -> None:
    assert search(lambda alpha: alpha != 0.2 and alpha < 1)[:7] == [0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2]


def test_search_is_bounded() -> None:
    found = search(lambda alpha: True, lambda alpha: alpha)
    assert found[:3] == [0, 0.1, 0.2]
    assert found[17] == 6553.6
    assert found[18:] == [4900, 8200, 9800]
    assert max(found) <= MAX_ALPHA


def test_search_goes_on_where_it_was() -> None:
    """What was tried decides, whatever the order, and alphas from elsewhere do not disturb it."""
    there = [0.0, 0.1, 0.4, 0.2, 0.8, 1.6, 3.2, 0.5, 0.33]
    assert AutoGrid().next(judgement(there, lambda alpha: alpha < 1, lambda alpha: 1 - (alpha - 0.45) ** 2)) == 0.3


def test_points_have_two_digits_and_do_not_move() -> None:
    """A refined point that is better than the alpha that it was refined from is not refined again."""
    found = search(lambda alpha: alpha < 10, lambda alpha: 1 - abs(alpha - 8.3) / 10)
    assert found[-3:] == [4.8, 8.0, 9.6]


def test_search_over_planted_observations() -> None:
    """With real judgements: a gain up to 0.5, and a collapse past 0.7."""
    planted = Planted(prompts=128, gain=lambda alphas: np.minimum(alphas, 0.5), collapse_from=0.7)
    tried = [0.0]
    settings = RuleSettings(rewards=(REWARD,), resamples=0)
    while True:
        seen = observations(Planted(**{**vars(planted), "alphas": tuple(sorted(tried))}), 0)
        alpha = AutoGrid().next(judge(seen, settings))
        if alpha is None:
            break
        tried.append(alpha)
    assert tried[:4] == [0, 0.1, 0.2, 0.4]
    assert max(tried) in (1.6, 3.2)
    assert len(tried) >= 9
