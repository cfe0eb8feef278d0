"""Asks a judge at an OpenAI-compatible address, and tries again where that can help.

The package ``openai`` repeats what failed on the way (408, 409, 429, 5xx, no connection, no answer in time), after
pauses that double from half a second to eight, with jitter, or that the server names (``Retry-After``). What it cannot
know is repeated here: a reply that is none, a parameter that the endpoint does not take, a thought that was cut.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from expo_serve.errors import ServeError
from expo_serve.sweep.comparison import is_thinking, probability_of_first
from expo_serve.sweep.scored import shorten, text_of

if TYPE_CHECKING:
    import openai

RETRIES = 10
"""Of a request that failed on the way, over about a minute: a judge that fails every second time is left without an
answer once in 2,048."""
_TRIES = 5
"""Of a question, where its replies are not those of a chat endpoint."""
_TRIES_UNDECIDED = 3
"""Of a question, where its replies are neither A nor B."""
_ANSWER_SECONDS = 300.0
_CONNECT_SECONDS = 10.0
_ROOM, _ROOM_TO_THINK = 8, 4096
"""Tokens of a reply: of a letter, and of a judge that thinks before it writes one."""
_OF_THIS_QUESTION = (400, 413, 422)
"""Statuses that refuse one request, for example one that is too long."""
_HINTS = {
    401: "set OPENAI_API_KEY to a key that it accepts",
    403: "set OPENAI_API_KEY to a key that may use this model",
    404: "check the address, which mostly ends in /v1, and the model's name",
}


Kind = Literal["undecided", "refused", "malformed", "failed", "unreachable"]
"""Why there is no verdict: the reply is neither A nor B; the endpoint refuses this question, for example as too long;
what it sends is not a chat's reply; it failed each time; it cannot be reached."""


@dataclass(frozen=True)
class NoVerdict:
    """A question without a verdict."""

    kind: Kind
    reason: str
    """One line."""

    @property
    def is_unanswered(self) -> bool:
        """Whether the judge, rather than the question, may be the cause."""
        return self.kind in ("failed", "unreachable")


@dataclass
class JudgeClient:
    """A judge's address, and what is known of it.

    Args:
        url: with ``/v1``.
        model: its name there.
        retries: of a request that failed on the way.
        answer_seconds: how long a reply may take.
    """

    url: str
    model: str
    retries: int = RETRIES
    answer_seconds: float = _ANSWER_SECONDS
    asked: int = 0
    """Requests sent, those included that failed."""
    failed: int = 0
    """Requests that failed on the way, or whose reply was none."""
    _refused: set[str] = field(default_factory=set)
    """Parameters that the endpoint does not take."""
    _thinks: bool = False

    def connect(self) -> openai.AsyncOpenAI:
        """Return a connection; it belongs to the event loop that first uses it."""
        import openai

        return openai.AsyncOpenAI(
            base_url=self.url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",  # local servers mostly ask for none
            max_retries=self.retries,
            timeout=openai.Timeout(self.answer_seconds, connect=_CONNECT_SECONDS),
        )

    async def ask(self, connection: openai.AsyncOpenAI, messages: list[dict[str, str]]) -> float | NoVerdict:
        """Ask one question; returns how much answer A is preferred, from 0 to 1.

        Raises:
            ServeError: the endpoint will answer no question: key, address or model are wrong.
        """
        undecided = 0
        for _ in range(_TRIES):
            reply = await self._choice(connection, messages)
            if not isinstance(reply, NoVerdict) and is_thinking(reply) and not self._thinks:
                self._thinks = True
                continue
            found = reply if isinstance(reply, NoVerdict) else _read(reply)
            if not isinstance(found, NoVerdict) or found.kind not in ("malformed", "undecided"):
                return found
            self.failed += found.kind == "malformed"
            undecided += found.kind == "undecided"
            if undecided == _TRIES_UNDECIDED:
                break
        return found

    async def _choice(
        self, connection: openai.AsyncOpenAI, messages: list[dict[str, str]]
    ) -> dict[str, Any] | NoVerdict:
        """Send a request, without what the endpoint does not take; returns the reply's first choice."""
        import openai

        while True:
            body = self._body(messages)
            try:
                response = await connection.chat.completions.with_raw_response.create(**body)
            except openai.APIStatusError as error:
                refused = _named(error, body)
                if refused is None or error.status_code not in (*_OF_THIS_QUESTION, 403):
                    return self._without_answer(error)
                self.asked += 1
                self._refused.add(refused)
            except openai.APIConnectionError as error:
                self._count(self.retries + 1)
                cause = _cause(error)
                if cause.startswith("ReadTimeout"):  # it is there, only slow
                    return NoVerdict("failed", f"no answer within {self.answer_seconds:g} s")
                return NoVerdict("unreachable", cause)
            else:
                self._count(response.retries_taken)
                self.asked += 1
                return _first_choice(response.http_response.text)

    def _body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        room = _ROOM_TO_THINK if self._thinks else _ROOM
        limit = "max_completion_tokens" if "max_tokens" in self._refused else "max_tokens"
        wanted: dict[str, Any] = {"temperature": 0, limit: room, "logprobs": True, "top_logprobs": 20}
        taken = {name: value for name, value in wanted.items() if name not in self._refused}
        if "logprobs" not in taken:
            taken.pop("top_logprobs", None)
        return {"model": self.model, "messages": messages, **taken}

    def _without_answer(self, error: openai.APIStatusError) -> NoVerdict:
        """Return what a status means for one question.

        Raises:
            ServeError: it means the same for every question.
        """
        status, reason = error.status_code, f"{error.status_code}: {_message(error)}"
        if status in _OF_THIS_QUESTION:
            self.asked += 1
            return NoVerdict("refused", reason)
        if status in (408, 409, 429) or status >= 500:
            self._count(self.retries + 1)
            return NoVerdict("failed", reason)
        raise ServeError(f"the judge {self.model} at {self.url} answers {reason}; {_HINTS.get(status, _HINTS[404])}")

    def _count(self, failed: int) -> None:
        """Count requests that failed."""
        self.asked += failed
        self.failed += failed


def _named(error: openai.APIStatusError, body: dict[str, Any]) -> str | None:
    """Return the parameter of ours that an endpoint's refusal names."""
    text = f"{error.param or ''} {_message(error)}".replace("top_logprobs", "logprobs")
    return next((name for name in ("logprobs", "temperature", "max_tokens") if name in body and name in text), None)


def _first_choice(text: str) -> dict[str, Any] | NoVerdict:
    try:
        choice = json.loads(text)["choices"][0]
        if isinstance(choice["message"], dict):
            return dict(choice)
    except (ValueError, LookupError, TypeError):
        pass
    return NoVerdict("malformed", f"it answers with something else than a chat's reply: {shorten(text, 80)!r}")


def _read(choice: dict[str, Any]) -> float | NoVerdict:
    try:
        found = probability_of_first(choice)
    except (LookupError, TypeError, AttributeError, ValueError):
        return NoVerdict("malformed", "its log-probabilities are not those of OpenAI's API")
    said = shorten(text_of(choice["message"]), 80)
    return NoVerdict("undecided", f"expected A or B, it says {said!r}") if found is None else found


def _message(error: openai.APIStatusError) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    return shorten(str(body.get("message") or error.response.text or error.response.reason_phrase), 200)


def _cause(error: openai.APIConnectionError) -> str:
    """Return why there was no answer, which the package keeps one exception further in."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return shorten(f"{type(cause).__name__} {cause}", 200).rstrip()
