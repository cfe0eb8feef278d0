"""The rule against planted data, of which the truth is known, and at the edges of what may come."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from expo_serve.sweep.feasibility import PROMPTS, NoCollapse, NotInferior, WithinBudget
from expo_serve.sweep.judgement import RuleSettings, judge
from expo_serve.sweep.rule import Evidence, choose_again, split
from expo_serve.sweep.statistics import ONE_SIDED, Array
from tests.sweep.planted import REWARD, Curve, Planted, chosen, evidence, loaded, observations, outcome, rising_to

SEEDS = 100
WITHOUT_BOOTSTRAP = RuleSettings(rewards=(REWARD,), resamples=0)
GAIN = Planted(prompts=128, gain=rising_to(0.5, 0.5), growth=0.2)
LONGER = Planted(prompts=128, growth=0.6, of_length=lambda length: length / 75)


def recommended(planted: Planted, first: int = 0, seeds: int = SEEDS) -> list[float]:
    """What the rule recommends under each of so many seeds."""
    return [chosen(planted, seed) for seed in range(first, first + seeds)]


def table(*rows: tuple[float, ...], repeat: int = 40, scatter: float = 0.01) -> Array:
    """Rewards by prompt and alpha: rows again and again, with a little noise."""
    rewards = np.tile(np.array(rows), (repeat, 1))
    return np.asarray(rewards + np.random.default_rng(0).normal(0, scatter, rewards.shape))


def plain(alphas: tuple[float, ...], rewards: Array, **more: NoCollapse) -> Evidence:
    """Evidence without lengths, so that the reward itself counts."""
    return Evidence(alphas, rewards, np.full(rewards.shape, np.nan), tuple(more.values()))


@pytest.mark.parametrize("batch", range(3))
@pytest.mark.parametrize("planted", [Planted(prompts=40), Planted(prompts=64, growth=0.3)], ids=["noise", "longer"])
def test_noise_recommends_alpha_0(planted: Planted, batch: int) -> None:
    assert recommended(planted, 1000 * batch).count(0) >= 95


def test_gain_is_found() -> None:
    found = recommended(GAIN)
    assert found.count(0) <= 10
    assert np.mean([alpha >= 0.3 for alpha in found]) >= 0.9


def test_gain_that_is_found_is_not_overstated() -> None:
    """Numbers of the half that has chosen would be too high: of the gains, the largest was taken."""
    shown, selected = [], []
    for seed in range(SEEDS):
        found = outcome(evidence(replace(GAIN, prompts=40, gain=rising_to(0.5, 0.1)), seed), seed)
        shown.append(found.effect.value[0])
        selected.append(found.gain.value[0, found.best[0]])
    assert np.mean(shown) < 0.14
    assert np.mean(selected) > 0.18


@pytest.mark.parametrize("grows_with", [lambda length: length / 75, lambda length: 2 * np.log(length)])
def test_reward_that_grows_with_length_alone_recommends_alpha_0(grows_with: Curve) -> None:
    assert recommended(replace(LONGER, of_length=grows_with)).count(0) >= 95


def test_without_length_control_that_reward_would_win() -> None:
    found = [evidence(LONGER, seed) for seed in range(20)]
    blind = [replace(one, lengths=np.full(one.lengths.shape, np.nan)) for one in found]
    assert sum(outcome(one, seed).chosen[0] != one.zero for seed, one in enumerate(blind)) >= 10


def test_reward_that_falls_with_length_takes_no_credit_for_length() -> None:
    """Longer answers with a lower reward, which are better than others as long: the mean reward must rise too."""
    planted = Planted(
        prompts=256, gain=rising_to(0.5, 0.6), growth=0.5, of_length=lambda length: -length / 30, alphas=(0, 0.5)
    )
    found = [outcome(evidence(planted, seed), seed) for seed in range(20)]
    assert sum(one.nearest[0] != 0 and one.effect.low()[0] > 0 for one in found) >= 15
    assert sum(one.chosen[0] != 0 for one in found) <= 3


def test_collapse_is_stopped_before() -> None:
    planted = Planted(prompts=128, gain=lambda alphas: 0.8 * np.minimum(alphas, 1), growth=0.2, collapse_from=0.5)
    found = recommended(planted)
    assert max(found) <= 0.5
    assert found.count(0) <= 20


def test_collapse_that_the_reward_does_not_see_is_refused() -> None:
    planted = Planted(prompts=64, gain=lambda alphas: 4 * alphas, collapse_from=0.5)
    assert max(recommended(planted, seeds=30)) <= 0.5


def test_loss_of_a_capability_beyond_the_margin_is_refused() -> None:
    planted = replace(GAIN, questions=2000, loss=lambda alphas: np.where(alphas >= 0.4, 0.05, 0.0))
    found = recommended(planted, seeds=40)
    assert max(found) < 0.4
    assert found.count(0) <= 20


def test_capability_that_is_kept_is_not_refused() -> None:
    found = [evidence(replace(GAIN, questions=2000), seed).feasible()[0].mean() for seed in range(20)]
    assert np.mean(found) > 0.85


def test_few_questions_show_nothing() -> None:
    found = judge(observations(replace(GAIN, prompts=20, questions=60), 0), WITHOUT_BOOTSTRAP)
    assert (found.decision.kind, found.decision.reason) == ("zero", "No alpha but 0 is feasible.")
    (line,) = found.alphas[1].infeasible_because
    assert line.startswith("capability task: ")
    assert "% at alpha 0; a loss of up to " in line
    assert line.endswith(" pp is not excluded (one-sided 95% bound, 60 questions); the margin is 2 pp")
    (remark,) = (one for one in found.decision.remarks if one.startswith("Capability task: 60 questions, up to "))
    assert "to show in 80% of sweeps that no loss is beyond 2 pp takes about " in remark


def test_task_without_answers_at_alpha_0_refuses_all_others() -> None:
    scores = np.array([[np.nan, 1.0], [np.nan, 0.0]])
    found = NotInferior("task", scores, 0, 0.02)
    assert found.broken().tolist() == [[False, True]]
    assert found.reason(1) == "capability task: no question has an answer both at this alpha and at alpha 0"
    assert found.remark([1]) is None


@pytest.mark.parametrize("count", [20, 40, 128])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_noise_refuses_few_alphas(count: int, share: float) -> None:
    cut = (np.random.default_rng(count).random((count, 2001)) < share).astype(float)
    assert NoCollapse(PROMPTS, cut, 0, "unfinished answers", 0.05).broken().mean() < 0.04 + 0.02 * (count < 64)


def test_rise_of_unfinished_answers_in_words() -> None:
    cut = np.zeros((40, 2))
    cut[:4, 0], cut[:20, 1] = 1, 1
    found = NoCollapse(PROMPTS, cut, 0, "unfinished answers", 0.05)
    assert found.broken().tolist() == [[False, True]]
    assert found.reason(1) == (
        "unfinished answers: 50.0% after 10.0% at alpha 0, a rise of 40.0 pp (95% interval 24.1 to 55.9 pp, "
        "40 prompts); at most 5 pp is allowed"
    )


def test_small_rise_is_allowed_though_it_is_certain() -> None:
    cut = np.zeros((1000, 2))
    cut[:40, 1] = 1
    assert not NoCollapse(PROMPTS, cut, 0, "unfinished answers", 0.05).broken().any()


def test_alpha_without_answers_is_refused() -> None:
    seen = list(observations(Planted(prompts=20, alphas=(0.0, 0.5)), 0))
    found = judge([*seen, loaded(1.0)], WITHOUT_BOOTSTRAP)
    assert found.decision.feasible == [0, 0.5]
    assert found.alphas[2].infeasible_because == ["no prompt has an answer both at this alpha and at alpha 0"]


def test_budget_of_kl() -> None:
    sums, tokens = np.array([[np.nan, 1.0, 4.0, np.nan]] * 3), np.array([[np.nan, 10.0, 10.0, np.nan]] * 3)
    found = WithinBudget(PROMPTS, sums, 0, tokens, 0.2)
    assert found.broken().tolist() == [[False, False, True, True]]
    assert found.reason(2) == "KL from alpha 0: 0.4 nats per token, over the budget of 0.2"
    assert found.reason(3) == "KL from alpha 0 is not known: no answer was scored under alpha 0"
    weighted = found.broken({PROMPTS: np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]])})
    assert weighted.tolist() == [[False, False, True, True]] * 2
    unknown = WithinBudget(PROMPTS, np.full((3, 4), np.nan), 0, tokens, 0.2)
    assert not unknown.broken().any()
    assert unknown.remark([]) == "The budget of KL was not applied: no answer was scored under alpha 0."


def test_nearest_alpha_within_one_standard_error_is_taken() -> None:
    rewards = table((0.0, 1.0, 1.01, 1.0), scatter=0.3, repeat=200)
    found = outcome(plain((0.0, 0.1, 0.2, 0.4), rewards))
    assert found.best[0] > 0
    assert found.chosen[0] == 1
    apart = outcome(plain((0.0, 0.1, 0.2, 0.4), table((0.0, 1.0, 1.5, 1.2))))
    assert apart.chosen[0] == apart.best[0] == 2


def test_alphas_below_0_take_part() -> None:
    alphas = (-0.5, -0.25, 0.0, 0.5)
    assert outcome(plain(alphas, table((1.0, 2.0, 0.0, 1.0)))).chosen[0] == 1
    assert alphas[int(outcome(plain(alphas, table((1.0, 1.0, 0.0, 1.0), scatter=0.0))).chosen[0])] == -0.25
    assert alphas[int(outcome(plain(alphas, table((1.0, 0.0, 0.0, 1.0), scatter=0.0))).chosen[0])] == 0.5


def test_rewards_that_are_all_the_same_recommend_alpha_0() -> None:
    found = outcome(plain((0.0, 0.5, 1.0), np.full((40, 3), 0.3)))
    assert found.chosen[0] == 0
    assert found.effect.value[0] == 0


@pytest.mark.parametrize("prompts", range(1, 14))
def test_few_prompts(prompts: int) -> None:
    """With fewer than six prompts in a half, not even a gain without scatter is shown."""
    found = outcome(plain((0.0, 0.5), np.tile([0.0, 1.0], (prompts, 1))))
    assert bool(found.chosen[0]) == (prompts >= 12)


def test_length_is_controlled_for_from_16_prompts_on() -> None:
    for prompts in (15, 16):
        assert evidence(Planted(prompts=prompts), 0).controls_length == (prompts == 16)
    few = judge(observations(Planted(prompts=15, alphas=(0.0, 0.5)), 0), WITHOUT_BOOTSTRAP)
    assert few.decision.effect is not None
    assert few.decision.effect.measure == "reward_change"
    assert "not controlled for the length of the answers, which takes 16 prompts" in few.decision.remarks[0]


def test_reward_of_the_length_in_tokens_is_no_gain() -> None:
    found = evidence(replace(LONGER, noise=0.0), 0)
    found = replace(found, rewards=0.1 * found.lengths)
    assert outcome(found).chosen[0] == found.zero


def test_missing_prompts_are_left_out_by_pairs() -> None:
    rewards = table((0.0, 1.0, 2.0), repeat=40)
    rewards[::2, 2] = np.nan
    rewards[::5, 0] = np.nan
    found = plain((0.0, 0.5, 1.0), rewards)
    assert outcome(found).chosen[0] == 2
    selection, unseen = split(found, 0)
    assert selection.sum() + unseen.sum() == len(found.scored) == 32
    assert sum(a[2] for a in map(found.pairs, (selection, unseen))) == 16


@pytest.mark.parametrize("prompts", [1, 2, 25, 40])
def test_halves_are_drawn_by_the_seed(prompts: int) -> None:
    found = evidence(Planted(prompts=prompts, alphas=(0.0, 0.5)), 0)
    halves = [split(found, seed) for seed in (0, 0, 1)]
    for selection, unseen in halves:
        assert (selection + unseen).tolist() == [[1.0] * prompts]
        assert selection.sum() == prompts // 2
    assert np.array_equal(halves[0], halves[1])
    assert prompts < 3 or not np.array_equal(halves[0], halves[2])


def test_choice_does_not_look_at_the_other_half() -> None:
    found = evidence(GAIN, 0)
    selection, unseen = split(found, 0)
    before = outcome(found)
    rewards = found.rewards.copy()
    rewards[unseen[0] > 0] *= -3
    after = outcome(replace(found, rewards=rewards))
    assert (after.best[0], after.nearest[0]) == (before.best[0], before.nearest[0])
    assert after.effect.value[0] < 0 < before.effect.value[0]
    rewards = found.rewards.copy()
    rewards[selection[0] > 0] += np.random.default_rng(0).normal(0, 1e-6, rewards[selection[0] > 0].shape)
    assert outcome(replace(found, rewards=rewards)).effect.value[0] == before.effect.value[0]


def test_judge_that_only_compares_can_recommend() -> None:
    strong = replace(GAIN, gain=rising_to(0.5, 0.8))
    found = judge(observations(strong, 0, judge=True), WITHOUT_BOOTSTRAP)
    assert found.decision.kind == "alpha"
    assert found.decision.effect is not None
    assert 0.1 < found.decision.effect.difference < 0.4
    noise = Planted(prompts=40, alphas=(0.0, 0.2, 0.4))
    of_noise = [judge(observations(noise, seed, judge=True), WITHOUT_BOOTSTRAP).recommendation for seed in range(10)]
    assert of_noise.count(0) >= 9


def test_bootstrap_says_how_often_each_alpha_is_chosen() -> None:
    found = judge(observations(GAIN, 0), RuleSettings(rewards=(REWARD,), resamples=500))
    decision = found.decision
    assert sum(decision.chosen_share.values()) == pytest.approx(1)
    assert decision.chosen_share.get("0", 0.0) < 0.2
    assert decision.alpha_low is not None
    assert decision.alpha_high is not None
    assert decision.effect is not None
    assert 0 <= decision.alpha_low <= decision.effect.alpha <= decision.alpha_high <= 2
    again = judge(observations(GAIN, 0), RuleSettings(rewards=(REWARD,), resamples=500))
    assert again == found


def test_bootstrap_of_noise_chooses_alpha_0_most_often() -> None:
    found = evidence(Planted(prompts=64), 3)
    again = choose_again(found, 0, 500)
    assert len(again) == 500
    assert np.mean(again == found.zero) > 0.6


def test_bootstrap_draws_the_questions_too() -> None:
    """Whether 0.5 is feasible hangs by a hair, so some resamples choose it and some do not."""
    rng = np.random.default_rng(0)
    known = (rng.random(1000) < 0.7).astype(float)
    changed = np.where(rng.random(1000) < 0.03, 1 - known, known)
    task = NotInferior("task", np.column_stack([known, changed]), 0, margin=0.0)
    task = replace(task, margin=1e-9 - task.estimate().low(ONE_SIDED)[0, 1])
    found = Evidence((0.0, 0.5), table((0.0, 1.0), repeat=40), np.full((40, 2), np.nan), (task,))
    shares = np.bincount(choose_again(found, 0, 400), minlength=2) / 400
    assert shares.min() > 0.05


def test_recommendation_in_words() -> None:
    found = judge(observations(GAIN, 0), WITHOUT_BOOTSTRAP)
    decision = found.decision
    assert decision.effect is not None
    alpha = decision.effect.alpha
    assert found.recommendation == alpha != 0
    assert decision.reason.startswith(f"Alpha {alpha:g} raises the length-controlled reward by 0.")
    assert "on 64 prompts that had no part in its choice" in decision.reason
    assert f"{decision.effect.low:.3g} to {decision.effect.high:.3g}" in decision.reason
    assert decision.effect.low < decision.effect.difference < decision.effect.high
    assert "No capability was measured (--lm-eval)" in "".join(decision.remarks)
    assert (decision.chosen_share, decision.alpha_low) == ({}, None)


def test_alpha_0_in_words() -> None:
    found = judge(observations(Planted(prompts=40), 0), WITHOUT_BOOTSTRAP)
    assert (found.decision.kind, found.recommendation) == ("zero", 0)
    assert found.decision.reason.startswith("No other alpha is shown to help: ")
    assert found.decision.best is not None
    assert found.decision.effect is not None
    assert any(one.startswith("With 20 prompts in the unseen half, a gain of 0.") for one in found.decision.remarks)
    assert any("noticed in 80% of sweeps only from 14 pp on" in one for one in found.decision.remarks)


def test_best_alpha_at_the_edge_is_remarked() -> None:
    planted = replace(GAIN, alphas=(0.0, 0.2, 0.5))
    found = judge(observations(planted, 0), WITHOUT_BOOTSTRAP)
    line = "The best alpha on the selection half, 0.5, is the outermost one tried: a better one may be beyond."
    assert line in found.decision.remarks


@pytest.mark.parametrize(
    ("rewards", "why"), [((), "No --reward was given"), (("other",), "No answer at alpha 0 has a score")]
)
def test_without_a_reward_nothing_is_recommended(rewards: tuple[str, ...], why: str) -> None:
    planted = Planted(prompts=64, collapse_from=0.5, alphas=(0.0, 0.5, 1.0, 2.0))
    found = judge(observations(planted, 0), RuleSettings(rewards=rewards))
    assert (found.decision.kind, found.recommendation, found.gains) == ("none", None, {})
    assert found.decision.reason.startswith(why)
    assert found.decision.reason.endswith("2 of 4 alphas are feasible.")
    assert found.decision.feasible == [0, 0.5]
    assert [one.feasible for one in found.alphas] == [True, True, False, False]


def test_alpha_0_alone() -> None:
    found = judge(observations(Planted(prompts=20, alphas=(0.0,)), 0), RuleSettings(rewards=(REWARD,)))
    assert (found.recommendation, found.decision.reason) == (0, "No alpha but 0 was tried.")
    assert judge([loaded(0.0)], RuleSettings()).decision.reason.endswith("1 of 1 alpha is feasible.")


def test_sentences_are_single_lines_with_an_end() -> None:
    planted = [Planted(prompts=30, collapse_from=0.2, questions=50), GAIN, Planted(prompts=3)]
    for one in planted:
        decision = judge(observations(one, 0), RuleSettings(rewards=(REWARD,), resamples=50, kl_budget=0.01)).decision
        for sentence in (decision.reason, *decision.remarks):
            assert "\n" not in sentence
            assert sentence.endswith(".")
            assert "nan" not in sentence


def test_judging_takes_seconds() -> None:
    seen = list(observations(replace(GAIN, prompts=256), 0))
    started = time.process_time()
    judge(seen, RuleSettings(rewards=(REWARD,)))
    assert time.process_time() - started < 8


def test_alphas_are_in_rising_order() -> None:
    seen = [*observations(Planted(prompts=4, alphas=(0.0, 0.5)), 0), loaded(-0.5), loaded(0.25)]
    alphas = [one.alpha for one in judge(seen, RuleSettings(resamples=10, rewards=(REWARD,))).alphas]
    assert all(one < two for one, two in pairwise(alphas))
    assert len(alphas) == 4
