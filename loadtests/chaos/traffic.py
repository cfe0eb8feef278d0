"""The requests of a soak: chat and completions, long and short, streams that clients leave, adapters."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from loadtests.chaos.outcomes import Request
from loadtests.chaos.streams import Choose

LEVELS = (1, 8, 32, 128, 64, 4, 16, 2)
"""How many clients ask at the same time, one level after the other."""
COMPARED_CLIENTS, COMPARED_TOKENS = 8, 48
_SHORT_WORDS, _LONG_WORDS = (3, 30), (150, 400)
_SHORT_TOKENS, _LONG_TOKENS = (1, 32), (48, 160)
_SHARE_LONG, _SHARE_STREAMED, _SHARE_LEFT, _SHARE_ADAPTER = 0.25, 0.75, 0.15, 0.25
_WORDS = [
    word
    for line in (Path(__file__).parents[2] / "deploy/demo/questions.jsonl").read_text().splitlines()
    for word in json.loads(line)["prompt"].split()
]


def mixed(models: list[str]) -> list[Choose]:
    """Return what each of the clients of the largest level asks.

    Args:
        models: the served name, and those of adapters.
    """

    def choose(chance: random.Random) -> Request:
        model = models[0] if chance.random() >= _SHARE_ADAPTER else chance.choice(models)
        is_long, is_chat = chance.random() < _SHARE_LONG, chance.random() < 0.5
        prompt = _prompt(chance, _LONG_WORDS if is_long else _SHORT_WORDS)
        tokens = chance.randint(*(_LONG_TOKENS if chance.random() < _SHARE_LONG else _SHORT_TOKENS))
        is_streamed = chance.random() < _SHARE_STREAMED
        leaves = chance.randint(1, tokens) if is_streamed and chance.random() < _SHARE_LEFT else None
        words = (
            "chat" if is_chat else "completion",
            "long" if is_long else "short",
            "stream" if is_streamed else "whole",
        )
        label = " ".join([*words, *(["adapter"] if model != models[0] else [])])
        body = {"model": model, "max_tokens": tokens, "temperature": chance.choice((0.0, 0.8))}
        return _request(body, prompt, is_chat=is_chat, is_streamed=is_streamed, leaves_after=leaves, label=label)

    return [choose] * max(LEVELS)


def compared(model: str) -> list[Choose]:
    """Return what the clients ask when two servers are compared: prompts and answers of one length."""

    def choose(chance: random.Random) -> Request:
        body = {"model": model, "max_tokens": COMPARED_TOKENS, "ignore_eos": True, "temperature": 0.0}
        return _request(body, _prompt(chance, (60, 60)), is_chat=False, label="compared")

    return [choose] * COMPARED_CLIENTS


def _prompt(chance: random.Random, words: tuple[int, int]) -> str:
    """Return words in a random order, so that no prompt's beginning was there before."""
    return " ".join([str(chance.randrange(10**6)), *chance.choices(_WORDS, k=chance.randint(*words))])


def _request(body: dict[str, Any], prompt: str, *, is_chat: bool, **more: Any) -> Request:
    if is_chat:
        return Request("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]}, **more)
    return Request("/v1/completions", {**body, "prompt": prompt}, **more)
