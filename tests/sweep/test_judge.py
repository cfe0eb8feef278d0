"""A judge at an OpenAI-compatible address: what it is asked, how it is read, and what is kept."""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from expo_serve.errors import ExpoError, UsageError
from expo_serve.sweep.cache import Cache, digest_of
from expo_serve.sweep.comparison import compose, probability_of_first
from expo_serve.sweep.observations import Failure, Preference
from expo_serve.sweep.rewards import open_reward
from expo_serve.sweep.scored import Scored
from tests.server import Server
from tests.sweep.judge_server import JudgeServer, with_logprobs, with_text
from tests.sweep.judging import USER, expected, item, open_judge, some, values

pytestmark = pytest.mark.locked  # the package openai comes with vLLM


def test_value_is_the_mean_probability_over_both_orders(tmp_path: Path) -> None:
    items = some(20)
    with JudgeServer() as server:
        found = list(open_judge(server, tmp_path).score(items))
    assert values(found) == pytest.approx(expected(items))
    assert {(one.alpha, one.reward) for one in found if isinstance(one, Preference)} == {(0.5, server.spec)}
    assert Counter(body["temperature"] for body in server.bodies) == {0: 40}
    assert {body["model"] for body in server.bodies} == {"judge"}


def test_judge_that_favours_a_place_decides_nothing(tmp_path: Path) -> None:
    with JudgeServer(judgement=lambda *_: 0.9) as server:
        found = values(list(open_judge(server, tmp_path).score(some(6))))
    assert list(found.values()) == pytest.approx([0.5] * 6)


def test_judge_without_logprobs_is_read_by_its_text(tmp_path: Path) -> None:
    items = [item(0, "much longer", "short"), item(1, "short", "much longer"), item(2, "equal", "EQUAL")]
    with JudgeServer(choose=lambda probability, _: with_text("A" if probability > 0.5 else "B.")) as server:
        assert values(list(open_judge(server, tmp_path).score(items))) == {0: 1, 1: 0, 2: 0.5}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A", 1),
        (" b", None),
        ("**B**", 0),
        ("[[A]]", 1),
        ("Answer B", 0),
        ("Answer: A.", 1),
        ("The better answer is B.", 0),
        ("B is better because it is short", 0),
        ("A good answer names the source.", None),
        ("Answer A is good, but answer B is better", None),
        ("tie", 0.5),
        ("It is a tie.", 0.5),
        ("", None),
        ("I cannot decide", None),
        ("<think>A seems right, or [[A]]</think>\n\nB", 0),
    ],
)
def test_text_of_a_verdict(text: str, value: float | None) -> None:
    assert probability_of_first(with_text(text)) == value


def test_first_token_decides_only_if_it_is_a_letter() -> None:
    choice = with_logprobs(0.7)
    assert probability_of_first(choice) == pytest.approx(0.8 * 0.7 / (0.8 * 0.7 + 0.8 * 0.3))
    tops = choice["logprobs"]["content"][0]["top_logprobs"]
    for top in tops:
        top["logprob"] = math.log(1e-3)
    assert probability_of_first(choice) == 1  # its text says A
    choice["message"]["content"] = "<think>"
    assert probability_of_first(choice) is None


def test_question_holds_the_whole_chat() -> None:
    chat: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": USER, "content": [{"type": "text", "text": "Look {here}"}, {"type": "image_url", "image_url": {}}]},
    ]
    (message,) = compose(chat, "one {first}", "two {second}")
    for text in ("System: Be brief.", "User: Look {here}", "one {first}", "two {second}"):
        assert text in message["content"]


def test_nothing_is_asked_about_the_same_text_or_without_a_reference(tmp_path: Path) -> None:
    items = [item(0, "one", "one", alpha=0), item(1, "same", "same\n"), item(2, "lonely", None)]
    with JudgeServer() as server:
        found = list(open_judge(server, tmp_path).score(items))
    assert server.bodies == []
    assert [one.value for one in found if isinstance(one, Preference)] == [0.5, 0.5]
    (failure,) = [one for one in found if isinstance(one, Failure)]
    assert (failure.prompt, failure.reward) == (2, server.spec)
    assert "no answer at alpha 0" in failure.reason


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    items = some(12)
    with JudgeServer() as server:
        results = open_judge(server, tmp_path, at_once=1).score(items)
        first = list(islice(results, 5))
        results.close()  # type: ignore[attr-defined]
        again = list(open_judge(server, tmp_path).score(items))
        assert values(again) == pytest.approx(expected(items))
        assert first == again[:5]
        assert len(server.answered) in (24, 25)  # one may have been under way
        server.bodies.clear()
        assert values(list(open_judge(server, tmp_path).score(items))) == values(again)
        assert server.bodies == []


def test_parameters_that_the_endpoint_does_not_take_are_left_out(tmp_path: Path) -> None:
    refused = {"logprobs": "logprobs", "temperature": "temperature", "max_tokens": "max_completion_tokens"}

    def check(body: dict[str, Any], _: str) -> tuple[int, str] | None:
        wrong = next((name for name in refused if name in body), None)
        status = 403 if wrong == "logprobs" else 400  # as OpenAI answers
        return (status, f"Unsupported parameter: {wrong!r}") if wrong else None

    with JudgeServer(check=check, choose=lambda probability, _: with_text("AB"[probability < 0.5])) as server:
        found = list(open_judge(server, tmp_path, at_once=1).score(some(5)))
    assert len(values(found)) == 5
    assert len(server.bodies) == 3 + 10
    assert server.bodies[-1].keys() == {"model", "messages", "max_completion_tokens"}


def test_judge_that_thinks_is_given_room(tmp_path: Path) -> None:
    def choose(probability: float, body: dict[str, Any]) -> dict[str, Any]:
        if body["max_tokens"] < 100:
            return with_text("<think>\nAnswer A is", "length")
        return with_text(f"<think>Is B it?</think>\n{'AB'[probability < 0.5]}")

    items = [item(0, "longer", "short"), item(1, "short", "longer")]
    with JudgeServer(choose=choose) as server:
        assert values(list(open_judge(server, tmp_path, at_once=1).score(items))) == {0: 1, 1: 0}
    assert len(server.bodies) == 1 + 4


def test_cache_passes_over_a_line_that_was_cut(tmp_path: Path) -> None:
    file = tmp_path / "cache.jsonl"
    Cache(file).put("one", 1.0)
    file.write_bytes(file.read_bytes() + b'{"key": "tw')
    cache = Cache(file)
    assert (cache.get("one"), cache.get("tw")) == (1.0, None)
    cache.put("three", 3.0)
    assert [Cache(file).get(key) for key in ("one", "three")] == [1.0, 3.0]


def test_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ExpoError, match=r"cannot be written: No such file or directory; .*--resume"):
        Cache(tmp_path / "missing/cache.jsonl").put("one", 1)


def test_digest_depends_on_every_part() -> None:
    one = {"url": "u", "model": "m", "messages": [{"role": USER, "content": "x"}]}
    assert len({digest_of(**{**one, key: "other"}) for key in one} | {digest_of(**one)}) == 4
    assert digest_of(a="1", b="2") == digest_of(b="2", a="1")
    assert digest_of(a="\ud800") != digest_of(a="\ud801")


@pytest.mark.engine
def test_a_model_of_ours_as_a_judge(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a real server of vLLM's, which gives log-probabilities; the order is averaged out."""
    monkeypatch.setenv("OPENAI_API_KEY", str(server.api_key))
    question = [{"role": USER, "content": "What is the capital of France?"}]
    pairs = [("The capital of France is Paris.", "Blue seven if."), ("Paris.", "It is Rome, a city in Italy.")]
    items = [Scored(0.5, number, question, *pair) for number, pair in enumerate(pairs)]
    swapped = [Scored(0.5, number, question, *pair[::-1]) for number, pair in enumerate(pairs)]
    spec = f"openai:{server.url}/v1,second"
    found = values(list(open_reward(spec, tmp_path).score(items)))
    assert all(0 < value < 1 for value in found.values())
    (tmp_path / "judge.jsonl").unlink()
    other = values(list(open_reward(spec, tmp_path).score(swapped)))
    assert [found[number] + other[number] for number in (0, 1)] == pytest.approx([1, 1], abs=0.05)
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(UsageError, match="401"):
        open_reward(spec, tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", str(server.api_key))
    with pytest.raises(UsageError, match=r"404: .*third.*does not exist"):
        open_reward(f"openai:{server.url}/v1,third", tmp_path)
