"""A judge that fails, refuses, hangs, says nothing, is gone or was never there."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from expo_serve.errors import ServeError, UsageError
from expo_serve.sweep.cache import digest_of
from expo_serve.sweep.judge import AT_ONCE, FIRST
from expo_serve.sweep.observations import Failure
from expo_serve.sweep.rewards import open_reward
from expo_serve.sweep.scored import Found
from tests.server import free_port
from tests.sweep.judge_server import JudgeServer, with_text
from tests.sweep.judging import expected, open_judge, some, values

pytestmark = pytest.mark.locked  # the package openai comes with vLLM

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
