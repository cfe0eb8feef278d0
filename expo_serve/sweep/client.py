"""Asks the engine under test: answers, log-probabilities, token counts. One connection pool, many requests at once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import httpx

from expo_serve.errors import ServeError
from expo_serve.sweep.at_once import ask_at_once
from expo_serve.sweep.endpoint import Endpoint

AT_ONCE = 256
"""Requests under way; vLLM itself decides how many of them it computes together."""
_NO_ANSWER_SECONDS = 3600.0
"""Of one request: a long answer may wait for a whole batch of others."""

_OF_ONE_REQUEST = frozenset({400, 413, 415, 422, 501})
"""Status codes that say something about a request, not about the engine."""

Item = TypeVar("Item")
Reply = TypeVar("Reply")


class EngineError(ServeError):
    """The engine does not answer as one that is well; its log has the cause."""


@dataclass(frozen=True)
class Rejected:
    """The engine's refusal of one request, in one line."""

    reason: str


@dataclass(frozen=True)
class Generated:
    """One answer of the engine."""

    text: str
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Natural log-probabilities of ``tokens``, before temperature."""
    finish_reason: str


class Client:
    """Requests to one endpoint; all of its methods are coroutines that return a :class:`Rejected` for a refusal.

    Args:
        endpoint: where, and which alpha every request is pinned to.
        http: carries the requests.
    """

    def __init__(self, endpoint: Endpoint, http: httpx.AsyncClient) -> None:
        self._endpoint, self._http = endpoint, http

    async def count(self, messages: Sequence[Any] | None, text: str = "") -> int | Rejected:
        """Return the number of tokens of a chat with its template, or of a text where there is no chat."""
        body = {"prompt": text} if messages is None else {"messages": messages}
        answer = await self._post("../tokenize", body)
        return answer if isinstance(answer, Rejected) else int(answer["count"])

    async def tokens(self, text: str) -> list[int] | Rejected:
        """Return the token ids of a text, with the special tokens that the model begins a text with."""
        answer = await self._post("../tokenize", {"prompt": text})
        return answer if isinstance(answer, Rejected) else list(answer["tokens"])

    async def generate(self, messages: Sequence[Any] | None, text: str, **sampling: Any) -> Generated | Rejected:
        """Answer a chat, or continue a text where there is no chat.

        Args:
            messages: of the chat, as OpenAI has them; None for a text.
            text: to continue.
            sampling: ``max_tokens``, ``temperature``, ``seed``: parameters of OpenAI's API.
        """
        wanted = {"return_token_ids": True, **sampling}
        if messages is None:
            answer = await self._post("completions", {"prompt": text, "logprobs": 0, **wanted})
        else:
            answer = await self._post("chat/completions", {"messages": messages, "logprobs": True, **wanted})
        if isinstance(answer, Rejected):
            return answer
        choice = answer["choices"][0]
        is_chat = messages is not None
        logprobs = [one["logprob"] for one in choice["logprobs"]["content"]] if is_chat else None
        return Generated(
            text=(choice["message"]["content"] or "") if is_chat else choice["text"],
            prompt_tokens=tuple((answer if is_chat else choice)["prompt_token_ids"]),
            tokens=tuple(choice["token_ids"]),
            logprobs=tuple(choice["logprobs"]["token_logprobs"] if logprobs is None else logprobs),
            finish_reason=choice["finish_reason"],
        )

    async def logprobs(self, tokens: Sequence[int]) -> list[float] | Rejected:
        """Return the natural log-probability of each of these tokens but the first, given those before it."""
        body = {"prompt": list(tokens), "prompt_logprobs": 0, "max_tokens": 1, "temperature": 0}
        answer = await self._post("completions", body)
        if isinstance(answer, Rejected):
            return answer
        found = answer["choices"][0]["prompt_logprobs"]
        pairs = zip(tokens[1:], found[1:], strict=True)
        return [float(of_token[str(token)]["logprob"]) for token, of_token in pairs]

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any] | Rejected:
        """Post a request.

        Raises:
            EngineError: the engine is gone, or serves another alpha.
        """
        url = f"{self._endpoint.url}/{path}".replace("/v1/../", "/")
        try:
            response = await self._http.post(url, json={"model": self._endpoint.model, **body})
        except httpx.HTTPError as error:
            raise EngineError(f"the engine does not answer: {type(error).__name__} {error}".rstrip()) from None
        if response.status_code in _OF_ONE_REQUEST or (response.status_code == 500 and await self._is_well()):
            return Rejected(_message(response))
        if response.status_code != 200:
            raise EngineError(f"the engine answers with status {response.status_code}: {_message(response)}")
        answer: dict[str, Any] = response.json()
        return answer

    async def _is_well(self) -> bool:
        """Return whether the engine is alive, so that an error was that of one request."""
        try:
            answer = await self._http.get(f"{self._endpoint.url}/health".replace("/v1/", "/"))
        except httpx.HTTPError:
            return False
        return answer.status_code == 200


def _message(response: httpx.Response) -> str:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text
    return " ".join(str(message).split())[:300]


def ask_all(
    endpoint: Endpoint, items: Sequence[Item], ask: Callable[[Client, Item], Awaitable[Reply]], at_once: int = AT_ONCE
) -> Iterator[tuple[Item, Reply]]:
    """Ask about all items, many at once, and yield each with its reply as it comes.

    Args:
        endpoint: whom to ask.
        items: what about.
        ask: asks about one item.
        at_once: requests under way at most.

    Raises:
        EngineError: the engine is gone; replies that came before are yielded first.
    """
    if not items:
        return

    async def pair(client: Client, item: Item) -> tuple[Item, Reply]:
        return item, await ask(client, item)

    yield from ask_at_once(partial(_connect, endpoint, at_once), items, pair, at_once)


@asynccontextmanager
async def _connect(endpoint: Endpoint, at_once: int) -> AsyncIterator[Client]:
    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    timeout = httpx.Timeout(_NO_ANSWER_SECONDS, connect=30.0)
    async with httpx.AsyncClient(headers=endpoint.headers, limits=limits, timeout=timeout, trust_env=False) as http:
        yield Client(endpoint, http)
