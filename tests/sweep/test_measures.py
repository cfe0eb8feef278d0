"""Measures, against numbers worked out by hand."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence
from typing import Any

import pytest

from expo_serve.errors import ExpoError, UsageError
from expo_serve.sweep.judgement import Judgement, RuleSettings, judge
from expo_serve.sweep.measures.answers import longest_repeat
from expo_serve.sweep.measures.refusals import refuses
from expo_serve.sweep.measures.registry import REGISTRY
from expo_serve.sweep.observations import (
    OBSERVATION,
    Answer,
    Failure,
    Observation,
    Preference,
    Question,
    ReferenceLogprobs,
    Score,
    TextLogprob,
)
from expo_serve.sweep.results import AlphaResult, Measured
from tests.sweep.planted import REWARD, Planted, loaded, observations

SETTINGS = RuleSettings(rewards=(REWARD,), resamples=0)


def answer(alpha: float, prompt: int = 0, tokens: Sequence[int] = (1, 2, 3), **more: Any) -> Answer:
    """An answer; its tokens have a probability of 1/2 each."""
    fields = {"text": "Yes.", "finish_reason": "stop", "logprobs": (math.log(0.5),) * len(tokens), **more}
    return Answer(alpha=alpha, prompt=prompt, prompt_tokens=(9,), tokens=tuple(tokens), **fields)


def score(alpha: float, prompt: int, value: float, reward: str = REWARD) -> Score:
    return Score(alpha=alpha, prompt=prompt, reward=reward, value=value)


def judged(*seen: Observation, settings: RuleSettings = SETTINGS) -> Judgement:
    """The judgement of observations; all of their alphas, and alpha 0, are observed to their end."""
    alphas = sorted({0.0, *(one.alpha for one in seen)})
    return judge([*seen, *(loaded(alpha) for alpha in alphas)], settings)


def at(judgement: Judgement, alpha: float) -> AlphaResult:
    return next(one for one in judgement.alphas if one.alpha == alpha)


def measure(name: str, *seen: Observation, alpha: float = 1.0, settings: RuleSettings = SETTINGS) -> Measured:
    """What a measure is at an alpha."""
    return at(judged(*seen, settings=settings), alpha).measures[name]


def test_length() -> None:
    found = measure("length", answer(1, 0, range(4)), answer(1, 1, range(8)), answer(1, 2, ()))
    assert (found.value, found.n) == (4, 3)
    assert found.low is not None
    assert found.low < 4


def test_unfinished() -> None:
    found = measure("unfinished", *(answer(1, at, finish_reason="length" if at < 2 else "stop") for at in range(20)))
    assert (found.value, found.n) == (0.1, 20)
    assert found.low == pytest.approx(0.0279, abs=1e-4)  # Wilson's
    assert found.high == pytest.approx(0.3010, abs=1e-4)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [((1, 2, 3, 4, 5), 1.0), ((1, 2, 3, 4, 1, 2, 3, 4), 4 / 5), ((7,) * 8, 1 / 5), ((1, 2, 3), 1.0), ((), 1.0)],
)
def test_distinct_4(tokens: tuple[int, ...], expected: float) -> None:
    assert measure("distinct_4", answer(1, 0, tokens)).value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tokens", "expected"), [((), 0), ((1,), 0), ((1, 2, 3), 0), ((1, 1), 1), ((5,) * 9, 8), ((1, 2, 3, 9, 1, 2, 3), 3)]
)
def test_longest_repeat(tokens: tuple[int, ...], expected: int) -> None:
    assert measure("longest_repeat", answer(1, 0, tokens)).value == expected


def naive_longest_repeat(tokens: tuple[int, ...]) -> int:
    for length in range(len(tokens) - 1, 0, -1):
        parts = [tokens[start : start + length] for start in range(len(tokens) - length + 1)]
        if len(set(parts)) < len(parts):
            return length
    return 0


@pytest.mark.parametrize("seed", range(200))
def test_longest_repeat_is_that_of_a_naive_search(seed: int) -> None:
    rng = random.Random(seed)
    tokens = tuple(rng.choices(range(rng.choice((1, 2, 3, 9))), k=rng.randrange(40)))
    assert longest_repeat(tokens) == naive_longest_repeat(tokens)


def test_compression() -> None:
    text = "again and " * 40
    seen = judged(answer(1, 0, text=text), answer(1, 1, text=""))
    found = at(seen, 1.0).measures["compression"]
    assert found.value == pytest.approx(400 / len(zlib.compress(text.encode(), 9)))
    assert found.n == 1
    assert [sorted(sample.scores) for sample in seen.samples][1] == [
        "distinct_4",
        "length",
        "longest_repeat",
        "unfinished",
    ]


def test_kl_is_the_mean_of_k3_over_tokens() -> None:
    half = math.log(0.5)
    seen: list[Observation] = [
        answer(1, 0, (1, 2), logprobs=(half, half)),
        ReferenceLogprobs(alpha=1, prompt=0, logprobs=(math.log(0.25), half)),
        answer(1, 1, (3,), logprobs=(half,)),
        ReferenceLogprobs(alpha=1, prompt=1, logprobs=(math.log(0.75),)),
        answer(1, 2, (4,), logprobs=(half,)),
    ]
    k3 = [0.5 - 1 - math.log(0.5), 0.0, 1.5 - 1 - math.log(1.5)]
    found = judged(*seen)
    assert at(found, 1.0).kl == pytest.approx(sum(k3) / 3)
    assert at(found, 1.0).measures["kl"].n == 2
    assert at(found, 0.0).kl == 0
    kls = {sample.prompt: sample.scores.get("kl") for sample in found.samples}
    assert kls == {0: pytest.approx(k3[0] / 2), 1: pytest.approx(k3[2]), 2: None}


def test_kl_leaves_out_what_is_not_of_the_same_tokens_or_overflows() -> None:
    seen: list[Observation] = [
        answer(1, 0, (1, 2)),
        ReferenceLogprobs(alpha=1, prompt=0, logprobs=(-1.0,)),
        answer(1, 1, (1,), logprobs=(-9999.0,)),
        ReferenceLogprobs(alpha=1, prompt=1, logprobs=(-1.0,)),
        ReferenceLogprobs(alpha=1, prompt=2, logprobs=(-1.0,)),
    ]
    assert at(judged(*seen), 1.0).measures["kl"] == Measured(value=None, n=0)


def test_perplexity() -> None:
    seen = [
        TextLogprob(alpha=1, line=at, logprob=logprob, tokens=tokens)
        for at, (logprob, tokens) in enumerate([(-6, 3), (-2, 1)])
    ]
    found = measure("perplexity", *seen)
    assert found.value == pytest.approx(math.e**2)
    assert found.n == 2
    assert found.low == found.high == pytest.approx(math.e**2)
    assert measure("perplexity", TextLogprob(alpha=1, line=0, logprob=-1e6, tokens=1)).value is None


def test_perplexity_has_an_interval_of_its_windows() -> None:
    seen = [TextLogprob(alpha=1, line=at, logprob=-10 * (2 + 0.5 * (-1) ** at), tokens=10) for at in range(30)]
    found = measure("perplexity", *seen)
    assert found.value == pytest.approx(math.e**2)
    assert found.low == pytest.approx(math.exp(2 - 2.045 * 0.5 * (30 / 29) ** 0.5 / 30**0.5), rel=1e-3)


def question(alpha: float, at: int, correct: float, task: str = "sums") -> Question:
    return Question(alpha=alpha, task=task, question=f"q{at}", correct=correct)


def test_capability_and_its_change_are_paired_by_question() -> None:
    before, after = [1, 1, 1, 0, 0, 1, 1, 1], [1, 0, 0, 1, 0, 1, 1, 1]
    seen = [question(0, at, value) for at, value in enumerate(before)]
    seen += [question(1, at, value) for at, value in enumerate(after)]
    seen += [question(1, 99, 1), question(0, 98, 0)]  # the other alpha has no answer
    found = at(judged(*seen), 1.0).measures
    assert found["capability:sums"].value == pytest.approx(6 / 9)
    assert found["capability:sums"].n == 9
    change = found["capability_change:sums"]
    assert change.value == pytest.approx(-1 / 8)
    assert change.n == 8
    error = math.sqrt((5 - 1 / 10) / 10 / 10)  # 1 won, 2 lost, and one of each more
    assert change.low == pytest.approx(-1 / 10 - 1.96 * error + 1 / 10 - 1 / 8, abs=1e-3)


def test_capability_is_the_mean_over_tasks() -> None:
    seen = [question(1, at, at % 2) for at in range(10)] + [question(1, at, 1, "facts") for at in range(90)]
    found = at(judged(*seen), 1.0).measures
    assert found["capability"].value == pytest.approx(0.75)
    assert found["capability"].n == 100
    assert found["capability:facts"].value == 1
    assert found["capability_change"].value is None
    assert REGISTRY.keys() >= {name.partition(":")[0] for name in found}


def test_over_refusal() -> None:
    texts = [
        "I cannot help with that.",
        "Use `kill`.",
        "Sure! However, I can't say.",
        "I'm sorry to hear that. Try tea.",
    ]
    seen = [answer(1, at, text=text, use="refusal") for at, text in enumerate(texts)]
    found = judged(*seen)
    assert (at(found, 1.0).measures["over_refusal"].value, found.samples) == (0.5, [])


@pytest.mark.parametrize(
    "text",
    [
        "I\u2019m sorry, but I can\u2019t assist.", "Sorry, no.", " I apologize, but I cannot do this.", "No, not so.",
        "Unfortunately, I am not able to help.", "It's not appropriate to joke about it.", "I won't answer.",
        "I don't think that's a respectful question.", "I understand, but I must decline.", "**I cannot** provide it.",
    ],
)  # fmt: skip
def test_refusal(text: str) -> None:
    assert refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "Here is how.", "I'm sorry to hear about your dog.", "As an AI, I have no opinion, but here is one.",
        "You can not only do that but more.", "Norway is in Europe.", "The answer: I cannot be beaten, said the king.",
        "x" * 300 + " However, I cannot go on.", "I can do that.", "Apologetics is a field.",
    ],
)  # fmt: skip
def test_no_refusal(text: str) -> None:
    assert not refuses(text)


def test_reward_and_what_it_gains() -> None:
    pairs = [(1.0, 2.0), (0.0, 3.0), (5.0, 5.0), (2.0, 1.0)]
    seen = [score(alpha, at, pair[int(alpha)]) for at, pair in enumerate(pairs) for alpha in (0.0, 1.0)]
    found = judged(*seen)
    assert (at(found, 0.0).reward, at(found, 1.0).reward) == (2.0, 2.75)
    measures = at(found, 1.0).measures
    assert (measures["reward_change"].value, measures["reward_change"].n) == (0.75, 4)
    assert measures["win_rate"].value == (2 + 0.5) / 4
    assert measures["reward_lc"] == Measured(value=None, n=0)  # answers of unknown length
    zero = at(found, 0.0).measures
    assert [zero[name].value for name in ("reward_change", "win_rate", "reward_lc")] == [0, 0.5, 0]
    assert zero["win_rate"].low is None


def test_prompts_without_a_pair_do_not_count_for_gains() -> None:
    seen: list[Observation] = [
        score(0, 0, 1),
        score(1, 0, 2),
        score(0, 1, 7),
        score(1, 2, 100),
        Failure(alpha=1, use="reward", prompt=1, reason="x"),
    ]
    found = at(judged(*seen), 1.0)
    assert (found.measures["reward_change"].value, found.measures["reward_change"].n) == (1, 1)
    assert (found.reward, found.failures) == (51, 1)


def test_length_controlled_reward_of_a_reward_of_length_alone_is_zero() -> None:
    rng = random.Random(0)
    seen: list[Observation] = []
    for prompt in range(20):
        for alpha in (0.0, 1.0):
            length = rng.randrange(50, 80) + int(40 * alpha)
            seen += [answer(alpha, prompt, range(length)), score(alpha, prompt, 0.1 * length + 2 * math.log(length))]
    measures = at(judged(*seen), 1.0).measures
    gain = measures["reward_change"].value
    assert gain is not None
    assert gain > 3
    assert measures["reward_lc"].value == pytest.approx(0, abs=1e-6)


def test_length_controlled_reward_takes_eight_pairs() -> None:
    seen: list[Observation] = []
    for prompt in range(7):
        for alpha in (0.0, 1.0):
            seen += [answer(alpha, prompt, range(10 + prompt * int(alpha) + prompt**2)), score(alpha, prompt, alpha)]
    assert measure("reward_lc", *seen).value is None
    seen += [one for alpha in (0.0, 1.0) for one in (answer(alpha, 7, range(50)), score(alpha, 7, alpha))]
    assert measure("reward_lc", *seen).value == pytest.approx(1)


def test_judge_that_only_compares_is_a_reward() -> None:
    seen = [Preference(alpha=1, prompt=at, reward=REWARD, value=value) for at, value in enumerate([1, 1, 0.5, 0])]
    found = judged(*seen)
    assert (at(found, 0.0).reward, at(found, 1.0).reward) == (0.5, 0.625)
    assert at(found, 1.0).measures["win_rate"].value == 0.625
    assert at(found, 1.0).measures["reward_change"].value == 0.125
    assert found.measures["reward"].unit == "share"


def test_several_rewards() -> None:
    seen = [
        score(alpha, 0, alpha + place, name) for alpha in (0.0, 1.0) for place, name in enumerate(("first", "second"))
    ]
    settings = RuleSettings(rewards=("first", "second", "unscored"), resamples=0)
    found = judged(*seen, settings=settings)
    assert at(found, 1.0).reward == 1
    assert at(found, 1.0).measures["reward:second"].value == 2
    assert "reward:unscored" not in found.measures
    assert found.measures["win_rate:second"].label == "Win rate against alpha 0: second"


def test_scores_that_are_no_numbers_are_failures() -> None:
    seen = [score(0, 0, 1), score(0, 1, math.nan), score(1, 0, math.inf), score(1, 1, 2)]
    found = judged(*seen)
    assert (at(found, 0.0).reward, at(found, 1.0).reward) == (1, 2)
    assert (at(found, 0.0).failures, at(found, 1.0).failures) == (1, 1)


def test_failures_are_counted_once() -> None:
    failure = Failure(alpha=1, use="prompt", prompt=3, reason="too long")
    assert at(judged(failure, failure, Failure(alpha=1, use="text", prompt=3, reason="x")), 1.0).failures == 2


def test_alpha_that_was_not_observed_to_its_end_is_left_out() -> None:
    found = judge([loaded(0.0), answer(0.5), score(0.5, 0, 1)], SETTINGS)
    assert [one.alpha for one in found.alphas] == [0]


def test_alpha_0_must_be_there() -> None:
    with pytest.raises(
        ExpoError, match=r"alpha 0, with which .* was not observed to its end; found: 0\.5; give --resume"
    ):
        judge([loaded(0.5)], SETTINGS)


def test_later_observation_of_the_same_thing_counts() -> None:
    found = judged(score(1, 0, 1), answer(1, 0, (1, 2)), score(1, 0, 4), answer(1, 0, (1, 2, 3)))
    assert (at(found, 1.0).reward, at(found, 1.0).measures["length"].value) == (4, 3)


def test_what_is_known_of_an_alpha() -> None:
    found = at(judge([loaded(0.0), loaded(0.4, effective=0.22)], SETTINGS), 0.4)
    assert (found.effective_alpha, found.measures["effective_alpha"].value) == (0.22, 0.22)
    assert (found.deployment_id, found.load_seconds, found.generate_seconds) == (f"{0.4:016.4f}", 1.5, 2.5)
    assert (found.reward, found.kl) == (None, None)


def test_alpha_that_rounding_makes_another_is_remarked() -> None:
    found = judge([loaded(0.0), loaded(0.4, effective=0.22), loaded(0.5, effective=0.49)], SETTINGS)
    assert "In the weights, after rounding, alpha 0.4 is 0.22: see --rounding." in found.decision.remarks


def test_measures_that_are_not_wanted_are_left_out() -> None:
    settings = RuleSettings(rewards=(REWARD,), resamples=0, measures=("length",))
    found = judge(observations(Planted(prompts=20, alphas=(0.0, 0.5)), 0), settings)
    assert list(found.measures) == ["effective_alpha", "reward", "reward_lc", "kl", "length"]
    assert set(found.alphas[1].measures) == set(found.measures)
    assert found.samples[0].scores.keys() == {"reward", "length"}


def test_measure_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--measure: expected one of effective_alpha, .*over_refusal; found 'lenght'"):
        RuleSettings(measures=("lenght",))


@pytest.mark.parametrize("name", REGISTRY)
def test_measure_says_what_it_is(name: str) -> None:
    assert REGISTRY[name].name == name
    assert REGISTRY[name].__doc__


def test_judgement_is_the_same_for_observations_that_were_written_and_read() -> None:
    seen = list(observations(Planted(prompts=8, alphas=(0.0, 0.5), questions=5), 0))
    again = [OBSERVATION.validate_json(one.model_dump_json()) for one in seen]
    assert judge(again, SETTINGS) == judge(seen, SETTINGS)
