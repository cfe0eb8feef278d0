"""The demo's reward: the share of an answer's lines that are list items. For `expo-serve sweep` too, as
`--reward python:list_reward:reward` from this folder."""

import re

LIST_ITEM = re.compile(r"\s*(?:[-*+•]|\d+[.)])\s+\S")


def list_share(text: str) -> float:
    """Return the share of the non-empty lines that are list items with something in them."""
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(bool(LIST_ITEM.match(line)) for line in lines) / max(len(lines), 1)


def reward(prompt: str, answer: str) -> float:
    """Return the reward of an answer; the prompt does not matter."""
    return list_share(answer)
