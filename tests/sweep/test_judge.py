"""A judge at an OpenAI-compatible address: what it is asked, how it is read, and what happens when it fails."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from expo_serve.errors import ExpoError, ServeError, UsageError
from expo_serve.sweep.cache import Cache, digest_of
from expo_serve.sweep.comparison import compose, probability_of_first
from expo_serve.sweep.judge import AT_ONCE, FIRST, Judge
from expo_serve.sweep.judge_client import JudgeClient
from expo_serve.sweep.observations import Failure, Preference
from expo_serve.sweep.rewards import open_reward
from expo_serve.sweep.scored import Found, Scored
from tests.server import Server, free_port
from tests.sweep.judge_server import JudgeServer, longer, with_logprobs, with_text

USER = "user"


def item(prompt: int, answer: str, reference: str | None, alpha: float = 0.5) -> Scored:
    """An answer to a prompt, and the one that it is compared with."""
    return Scored(alpha, prompt, [{"role": USER, "content": f"question {prompt}?"}], answer, reference)


def some(count: int) -> list[Scored]:
    """Answers that are shorter or longer than their references, by one or two characters."""
    sizes = (3, 4, 6, 7)
    return [item(number, f"{number:02} " + "x" * sizes[number % 4], f"{number:02} xxxxx") for number in range(count)]


def open_judge(server: JudgeServer, folder: Path, **options: Any) -> Judge:
    """A judge without a question on trial, which would count."""
    at_once = options.pop("at_once", AT_ONCE)
    client = JudgeClient(server.url, "judge", **options)
    return Judge(server.spec, client, Cache(folder / "judge.jsonl"), at_once)


def values(found: list[Found]) -> dict[int, float]:
    """Preferences by prompt; all must be preferences."""
    assert [one for one in found if not isinstance(one, Preference)] == []
    return {one.prompt: one.value for one in found if isinstance(one, Preference)}


def expected(items: list[Scored]) -> dict[int, float]:
    """The mean of both orders by the server's own rule."""
    return {
        one.prompt: (longer(one.answer, one.reference or "") + 1 - longer(one.reference or "", one.answer)) / 2
        for one in items
    }


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


FAULTS = (None, "500", None, "429", None, "garbage", None, "503", None, "reset")


def test_judge_that_fails_half_of_its_requests_gives_all_preferences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = some(40)
    with JudgeServer(fault=lambda number: FAULTS[number % len(FAULTS)]) as server:
        judge = open_judge(server, tmp_path)
        assert values(list(judge.score(items))) == pytest.approx(expected(items))
    failed = sum(FAULTS[number % len(FAULTS)] is not None for number in range(len(server.bodies)))
    assert failed >= 75
    warning = f"expo-serve: warning: the judge judge at {server.url}: {failed} of {len(server.bodies)} requests failed"
    assert warning in capsys.readouterr().err


def test_reply_that_does_not_come_is_asked_for_again(tmp_path: Path) -> None:
    items = some(2)
    with JudgeServer(fault=lambda number: "hang" if number == 1 else None) as server:
        found = list(open_judge(server, tmp_path, answer_seconds=0.3).score(items))
    assert values(found) == pytest.approx(expected(items))
    assert len(server.bodies) == 5


def test_reply_that_never_comes_is_named(tmp_path: Path) -> None:
    with (
        JudgeServer(fault=lambda _: "hang") as server,
        pytest.raises(ServeError, match=r"does not answer any more: no answer within 0\.2 s"),
    ):
        list(open_judge(server, tmp_path, retries=0, answer_seconds=0.2).score(some(1)))


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


def test_judge_that_goes_away_is_one_line_and_what_it_said_is_kept(tmp_path: Path) -> None:
    items = some(30)
    with JudgeServer(fault=lambda number: "reset" if number >= 25 else None) as server:
        found: list[Found] = []
        with pytest.raises(ServeError, match=rf"judge at {server.url} does not answer any more: .*; .*--resume"):
            found.extend(open_judge(server, tmp_path, retries=0).score(items))
        kept = {json.loads(line)["key"] for line in (tmp_path / "judge.jsonl").read_text().splitlines()}
        assert 25 - AT_ONCE < len(kept) <= 25  # the end may come before a slow reply
        server.fault = lambda _: None
        server.bodies.clear()
        assert values(list(open_judge(server, tmp_path).score(items))) == pytest.approx(expected(items))
        asked = {digest_of(url=server.url, model="judge", messages=body["messages"]) for body in server.bodies}
        assert len(asked) == 60 - len(kept)
        assert not asked & kept


def test_question_that_is_never_answered_is_a_failure_among_others(tmp_path: Path) -> None:
    items = some(12)
    with JudgeServer(fault=lambda number: "503" if number in (8, 9, 10) else None) as server:
        found = list(open_judge(server, tmp_path, retries=0, at_once=4).score(items))
    failures = [one for one in found if isinstance(one, Failure)]
    assert {one.reason for one in failures} == {"503: overloaded"}
    assert 2 <= len(failures) <= 3
    assert len(found) == 12


def test_judge_that_answers_nothing_is_no_failure_of_the_answers(tmp_path: Path) -> None:
    with (
        JudgeServer(fault=lambda _: "503") as server,
        pytest.raises(ServeError, match="does not answer any more: 503: overloaded"),
    ):
        list(open_judge(server, tmp_path, retries=1).score(some(1)))


def test_key_that_is_withdrawn_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "my-key")

    def check(body: dict[str, Any], key: str) -> tuple[int, str] | None:
        return None if key == "Bearer my-key" and "question 0?" in str(body) else (401, "wrong key")

    with JudgeServer(check=check) as server, pytest.raises(ServeError, match="401: wrong key; set OPENAI_API_KEY"):
        list(open_judge(server, tmp_path, at_once=1).score(some(3)))
    assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 2


def test_question_that_is_refused_is_a_failure(tmp_path: Path) -> None:
    def check(body: dict[str, Any], _: str) -> tuple[int, str] | None:
        return (400, "context length exceeded") if "question 2?" in str(body) else None

    with JudgeServer(check=check) as server:
        found = list(open_judge(server, tmp_path).score(some(4)))
    assert [(one.prompt, one.reason) for one in found if isinstance(one, Failure)] == [
        (2, "400: context length exceeded")
    ]
    assert len(found) == 4


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


def test_judge_that_says_nothing_useful_leaves_failures(tmp_path: Path) -> None:
    def choose(probability: float, body: dict[str, Any]) -> dict[str, Any]:
        return with_text("Sure! Here is" if "question 1?" in str(body) else "AB"[probability < 0.5])

    with JudgeServer(choose=choose) as server:
        found = list(open_judge(server, tmp_path).score(some(5)))
    (failure,) = [one for one in found if isinstance(one, Failure)]
    assert (failure.prompt, failure.reason) == (1, "expected A or B, it says 'Sure! Here is'")
    assert len(server.bodies) == 8 + 2 * 3


def test_judge_that_never_decides_is_given_up(tmp_path: Path) -> None:
    found: list[Found] = []
    with (
        JudgeServer(choose=lambda *_: with_text("I am a model.")) as server,
        pytest.raises(ServeError, match=f"decided none of the first {FIRST} comparisons.*'I am a model.'"),
    ):
        found.extend(open_judge(server, tmp_path).score(some(30)))
    assert found == []


def test_stops_at_once_and_works_in_a_notebook(tmp_path: Path) -> None:
    async def notebook() -> float:
        with JudgeServer(fault=lambda number: "hang" if number >= 10 else None) as server:
            results = open_judge(server, tmp_path).score(some(20))
            assert next(results)
            started = time.monotonic()
            results.close()  # type: ignore[attr-defined]
            return time.monotonic() - started

    assert asyncio.run(notebook()) < 1


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("http://127.0.0.1:1/v1", "expected openai:URL,MODEL"),
        ("http://127.0.0.1:1/v1,", "expected openai:URL,MODEL"),
        ("127.0.0.1:1/v1,judge", "expected openai:URL,MODEL"),
        ("http://127.0.0.1:port/v1,judge", "expected openai:URL,MODEL"),
        ("http://me:secret@127.0.0.1:1/v1,judge", "leave name and password out"),
    ],
)
def test_wrong_spec(rest: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        open_reward(f"openai:{rest}", tmp_path)
    assert "secret" not in str(raised.value)


def test_nobody_at_the_address(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(UsageError, match=f"openai:{url},judge: the judge does not answer: ConnectError .*; check"):
        open_reward(f"openai:{url},judge", tmp_path)


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((401, "Unauthorized"), "answers 401: Unauthorized; set OPENAI_API_KEY"),
        ((404, "The model `judge` does not exist."), "answers 404: The model `judge` does not exist.; check the addr"),
        ((400, "no such model"), "does not answer: 400: no such model"),
    ],
)
def test_judge_that_refuses_is_found_before_anything_starts(
    refusal: tuple[int, str], message: str, tmp_path: Path
) -> None:
    with JudgeServer(check=lambda *_: refusal) as server, pytest.raises(UsageError, match=message):
        open_reward(server.spec, tmp_path)


def test_page_that_is_no_judge_is_found_before_anything_starts(tmp_path: Path) -> None:
    with (
        JudgeServer(fault=lambda _: "garbage") as server,
        pytest.raises(UsageError, match="else than a chat's"),
    ):
        open_reward(server.spec, tmp_path)


def test_opens_a_judge_that_is_busy_and_an_address_without_path(tmp_path: Path) -> None:
    folder = tmp_path / "not made yet"
    with JudgeServer(fault=lambda number: "503" if number < 3 else None) as server:
        judge = open_reward(f"openai:{server.url.removesuffix('/v1')},judge", folder)
        assert not judge.is_late
        folder.mkdir()
        assert values(list(judge.score(some(1)))) == pytest.approx(expected(some(1)))


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
