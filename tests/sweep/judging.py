"""Answers to be judged, and what becomes of them by the rule of the tests' judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from expo_serve.sweep.cache import Cache
from expo_serve.sweep.judge import AT_ONCE, Judge
from expo_serve.sweep.judge_client import JudgeClient
from expo_serve.sweep.observations import Preference
from expo_serve.sweep.scored import Found, Scored
from tests.sweep.judge_server import JudgeServer, longer

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
