"""Clients that retry nothing, and keep account of each answer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx

QUESTION = "What should I know about planting a tree?"
SHORT_TOKENS = 8
STREAMED_TOKENS = 48
_TIMEOUT_SECONDS = 120.0
_PAUSE_SECONDS = 0.2


class Stream(threading.Thread):
    """A streamed answer of so many tokens, read as it comes; begun by ``start``."""

    def __init__(self, url: str, key: str, model: str, tokens: int) -> None:
        super().__init__(daemon=True)
        self.pieces: list[int] = []
        self.reason: str | None = None
        self.done = False
        self.headers: Mapping[str, str] = {}
        self._tokens = tokens
        self._error: str | None = None
        self._url, self._key, self._body = f"{url}/v1/completions", key, _body(model, tokens) | {"stream": True}

    def run(self) -> None:
        """To the end of the answer."""
        try:
            self._read()
        except (httpx.HTTPError, ValueError) as error:
            self._error = f"{type(error).__name__}: {error}"

    def _read(self) -> None:
        with httpx.stream(
            "POST", self._url, json=self._body, headers=_authorization(self._key), timeout=_TIMEOUT_SECONDS
        ) as answer:
            self.headers = answer.headers
            if answer.status_code != 200:
                self._error = f"status {answer.status_code}: {answer.read()!r:.300}"
                return
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    self.done = True
                elif line:
                    self._take(json.loads(line.removeprefix("data: ")))

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self._error = f"an error in the stream: {event['error']['message']}"
            return
        (choice,) = event["choices"]
        self.pieces += choice["token_ids"]
        self.reason = choice["finish_reason"]

    def wait_for(self, tokens: int, timeout: float = 60) -> None:
        """Until so many tokens are there."""
        deadline = time.monotonic() + timeout
        while len(self.pieces) < tokens:
            assert time.monotonic() < deadline
            assert self.is_alive(), self.problem()
            time.sleep(0.02)

    @property
    def left(self) -> int:
        """Tokens that are still to come."""
        return self._tokens - len(self.pieces)

    def problem(self) -> str | None:
        """What is wrong with the answer; None if it is whole."""
        if self._error:
            return self._error
        found = (self.reason, self.done, len(self.pieces))
        return None if found == ("length", True, self._tokens) else f"cut: reason, end, tokens are {found}"


class Answer(NamedTuple):
    """What came of one request."""

    kind: str
    began: float
    seconds: float
    headers: Mapping[str, str]
    problem: str | None


class Clients:
    """Steady load: each of some clients sends its next request a moment after the last answer.

    Args:
        url: what they ask.
        key: the API key.
        model: the name that they ask for.
        streams: clients that read streams of ``STREAMED_TOKENS``.
        shorts: clients that want ``SHORT_TOKENS`` at once.
    """

    def __init__(self, url: str, key: str, model: str, *, streams: int, shorts: int) -> None:
        self.answers: list[Answer] = []
        self._url, self._key, self._model = url, key, model
        self._ended = threading.Event()
        work = [self._stream] * streams + [self._short] * shorts
        self._threads = [threading.Thread(target=self._repeat, args=(one,), daemon=True) for one in work]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(_TIMEOUT_SECONDS)

    def problems(self) -> list[str]:
        """Of all answers so far."""
        return [f"{one.kind}: {one.problem}" for one in self.answers if one.problem]

    def _repeat(self, ask: Any) -> None:
        while not self._ended.is_set():
            began = time.monotonic()
            headers, problem = ask()
            kind = ask.__name__.strip("_")
            self.answers.append(Answer(kind, began, time.monotonic() - began, headers, problem))
            self._ended.wait(_PAUSE_SECONDS)

    def _stream(self) -> tuple[Mapping[str, str], str | None]:
        stream = Stream(self._url, self._key, self._model, STREAMED_TOKENS)
        stream.run()
        return stream.headers, stream.problem()

    def _short(self) -> tuple[Mapping[str, str], str | None]:
        try:
            answer = httpx.post(
                f"{self._url}/v1/completions",
                json=_body(self._model, SHORT_TOKENS),
                headers=_authorization(self._key),
                timeout=_TIMEOUT_SECONDS,
            )
        except httpx.HTTPError as error:
            return {}, f"{type(error).__name__}: {error}"
        if answer.status_code != 200:
            return answer.headers, f"status {answer.status_code}: {answer.text:.300}"
        tokens = answer.json()["usage"]["completion_tokens"]
        return answer.headers, None if tokens == SHORT_TOKENS else f"{tokens} tokens"


def _body(model: str, tokens: int) -> dict[str, Any]:
    common = {"model": model, "prompt": QUESTION, "temperature": 0, "max_tokens": tokens}
    return {**common, "ignore_eos": True, "return_token_ids": True}


def _authorization(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
