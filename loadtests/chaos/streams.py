"""Clients that keep asking a server, from a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from types import TracebackType

import aiohttp

from loadtests.chaos.outcomes import Answer, Outcome, Request, ask

PATIENCE_SECONDS = 90.0
"""A client waits so long for the next byte: longer than any fault lasts."""
_RETRY_SECONDS = 0.3
_POLL_SECONDS = 0.05
_PATIENCES = 10
"""After so many times a client's patience even one that gets something is given up."""

Choose = Callable[[random.Random], Request]


class Streams:
    """A number of clients; each sends its next request when its last one has ended.

    The answers are collected in :attr:`answers`, in the order of their ends.

    Args:
        url: the server's root.
        choosers: one for each client: makes its next request.
        seed: of what the clients choose.
        patience: seconds for which a client waits for the next byte.
    """

    def __init__(self, url: str, choosers: list[Choose], seed: int, patience: float = PATIENCE_SECONDS) -> None:
        self._url, self._choosers, self._seed, self._patience = url, choosers, seed, patience
        self._ends = threading.Event()
        self._active = 0
        self._open = [False] * len(choosers)
        self.answers: list[Answer] = []
        self.crashes: list[BaseException] = []

    def __enter__(self) -> Streams:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ends.set()
        self._thread.join()

    def go_on(self, clients: int | None = None) -> None:
        """Let so many clients ask, all of them by default; the others end what they have begun."""
        self._active = len(self._choosers) if clients is None else clients

    def pause(self) -> bool:
        """Let no client begin another request; returns whether all that were open have ended.

        A client ends by itself when it gets nothing for the time of its patience. One that gets a token now and then,
        as from a machine that is busy, is waited for.
        """
        self._active = 0
        deadline = time.monotonic() + _PATIENCES * self._patience
        while any(self._open) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return not any(self._open)

    def ended_since(self, moment: float) -> list[Answer]:
        """Return the answers that ended after a moment of CLOCK_MONOTONIC."""
        return [answer for answer in self.answers if answer.ended >= moment]

    def _run(self) -> None:
        asyncio.run(self._run_all())

    async def _run_all(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._patience, sock_read=self._patience)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            clients = [asyncio.create_task(self._client(session, number)) for number in range(len(self._choosers))]
            while not self._ends.is_set():
                await asyncio.sleep(_POLL_SECONDS)
            for client in clients:
                client.cancel()
            ends = await asyncio.gather(*clients, return_exceptions=True)
        self.crashes += [end for end in ends if isinstance(end, Exception)]

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        chance = random.Random(f"{self._seed} {number}")
        while True:
            if number >= self._active:
                await asyncio.sleep(_POLL_SECONDS)
                continue
            self._open[number], clients = True, self._active
            try:
                answer = await ask(session, self._url, self._choosers[number](chance))
            finally:
                self._open[number] = False
            answer.clients = clients
            self.answers.append(answer)
            if answer.outcome in (Outcome.REFUSED, Outcome.BUSY, Outcome.CLOSED):
                await asyncio.sleep(_RETRY_SECONDS)


def steady(model: str, clients: int) -> list[Choose]:
    """Return the requests of steady clients: the first one sends short ones all the time, the others mixed ones.

    Args:
        model: the served name.
        clients: how many, 2 at least.
    """

    def short(chance: random.Random) -> Request:
        return _completion(model, chance, 4)

    def mixed(chance: random.Random) -> Request:
        return _completion(model, chance, chance.choice((16, 60, 150, 400)))

    return [short, *[mixed] * (clients - 1)]


def _completion(model: str, chance: random.Random, tokens: int) -> Request:
    prompt = f"Story {chance.randrange(10_000)}: once upon a time"
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0.8}
    return Request("/v1/completions", body)
