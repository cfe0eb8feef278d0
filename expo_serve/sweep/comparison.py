"""What a judge is asked, and how its reply is read: which of two answers to one request is better.

The comparison of a pair, its rules and its biases are those of Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and
Chatbot Arena", arXiv 2306.05685 (section 3, figure 5; position bias: 3.3 and 3.4), in other words. Two things differ.
The judge is not asked for a reason first, and it has to choose: its reply is one letter, whose probability says how
sure it is. An undecided judge is at 0.5 on the average over both orders, so no third verdict is needed; one that says
"tie" all the same counts as 0.5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from expo_serve.sweep.scored import text_of

LEAST_MASS = 0.02
"""The first token's probability of A and B together, below which the token is no verdict but the start of something
else, of a thought for example."""

_TASK = """\
You compare two answers to the same request and decide which one serves the user better. Look at whether an answer \
does what was asked, and at how correct, relevant, clear and detailed it is. Let neither the order of the answers, nor \
their length, nor how sure of themselves they sound decide.

[Request]
{request}
[End of request]

[Answer A]
{first}
[End of answer A]

[Answer B]
{second}
[End of answer B]

Which answer is better, A or B? Reply with this one letter and nothing else."""

_ONLY = re.compile(r"[\W_]*([AB])[\W_]*")
_BRACKETS = re.compile(r"\[\[([AB])\]\]")
_NAMED = re.compile(r"\b(?i:answer|assistant|response|choice|option|verdict|winner|better)\b\W*(?:is\b\W*)?([AB])\b")
_STATED = re.compile(r"^\W*([AB])\b\W+(?:is|was)\b(?! not)")
_TIE = re.compile(r"\W*(?:(?:it|this) is a |a )?tie\W*", re.IGNORECASE)
_THOUGHT = re.compile(r".*</think(?:ing)?>", re.DOTALL)


def compose(messages: Sequence[dict[str, Any]], first: str, second: str) -> list[dict[str, str]]:
    """Return the chat that asks a judge to compare two answers.

    One message of the user: not every chat template has a place for a system prompt.

    Args:
        messages: the chat that was answered.
        first: the answer that is shown as A.
        second: the answer that is shown as B.
    """
    return [{"role": "user", "content": _TASK.format(request=_transcript(messages), first=first, second=second)}]


def _transcript(messages: Sequence[dict[str, Any]]) -> str:
    """Return a chat as text: a single message by itself, several with their roles."""
    if len(messages) == 1:
        return text_of(messages[0])
    return "\n\n".join(f"{str(message['role']).capitalize()}: {text_of(message)}" for message in messages)


def probability_of_first(choice: dict[str, Any]) -> float | None:
    """Return how much a judge prefers answer A, from 0 to 1; None where it says neither A nor B.

    ``p(A) / (p(A) + p(B))`` by the probabilities of the first token where the endpoint gives them, else 0 or 1 by the
    text.

    Args:
        choice: of the reply, as OpenAI's API has it.
    """
    by_token = _by_first_token(choice)
    return _by_text(text_of(choice["message"])) if by_token is None else by_token


def is_thinking(choice: dict[str, Any]) -> bool:
    """Return whether a reply was cut before its verdict, in the middle of a thought."""
    text = text_of(choice["message"]).lstrip()
    return choice.get("finish_reason") == "length" and (not text or text.startswith("<think"))


def _by_first_token(choice: dict[str, Any]) -> float | None:
    tokens = (choice.get("logprobs") or {}).get("content") or []
    if not tokens:
        return None
    mass = {"A": 0.0, "B": 0.0}
    for candidate in tokens[0].get("top_logprobs") or []:
        letter = str(candidate["token"]).strip(" \n▁Ġ")
        if letter in mass:
            mass[letter] += math.exp(candidate["logprob"])
    total = mass["A"] + mass["B"]
    return mass["A"] / total if total >= LEAST_MASS else None


def _by_text(text: str) -> float | None:
    said = _THOUGHT.sub("", text).strip()
    if _TIE.fullmatch(said):
        return 0.5
    if only := _ONLY.fullmatch(said):
        return float(only[1] == "A")
    found = _BRACKETS.findall(said) or _NAMED.findall(said) or _STATED.findall(said)
    return float(found[-1] == "A") if len(set(found)) == 1 else None
