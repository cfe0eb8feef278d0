"""Asks vLLM's engines whether they live: nothing else tells a hung engine from one that has nothing to say.

Each engine core is asked first, which answers between two steps, and then each of its workers, through the queue that
the model's steps go through. One question is under way at a time, so the cost is bounded: a few messages every ten
seconds at most. A long prefill delays an answer by a step or two. Where such a step takes longer than the timeout,
which a CPU's can, ranks that are seen to compute count as an answer (:mod:`expo_serve.vllm_plugin.computing`). One that
computes for ever is left to vLLM, which waits for a step for 300 s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from expo_serve.state.shared import Reporter
from expo_serve.vllm_plugin import compat
from expo_serve.vllm_plugin.engines import call_engines, call_ranks
from expo_serve.vllm_plugin.worker import ALIVE_METHOD

_LONGEST_INTERVAL = 10.0
_PART = 5.0
"""Questions in an engine timeout, so that the time in which a hang is noticed is not much longer than that."""
logger = compat.init_logger("vllm.expo_serve.watchdog")


class Watchdog:
    """Knows when all engines have last answered.

    Args:
        engine_client: vLLM's client of the engines.
        timeout: seconds without an answer after which they count as hung; 0 is never.
        reporter: is told of each answer.
        is_computing: given the time of a question, returns whether all who owe an answer have computed since the
            last call; None where that cannot be seen.
    """

    def __init__(
        self,
        engine_client: Any,
        timeout: float,
        reporter: Reporter,
        is_computing: Callable[[float], bool] | None = None,
    ) -> None:
        self._client, self._timeout, self._reporter = engine_client, timeout, reporter
        self._is_computing = is_computing
        self._interval = min(_LONGEST_INTERVAL, timeout / _PART)
        self._answered = time.monotonic()

    @property
    def silent_seconds(self) -> float:
        """Seconds since the last answer, or what counts as one."""
        return time.monotonic() - self._answered

    @property
    def is_hung(self) -> bool:
        """Whether an answer has been missing for too long."""
        return 0 < self._timeout < self.silent_seconds

    async def run(self) -> None:
        """Ask again and again, until the engines are gone."""
        if self._timeout:
            self._reporter.update(answered=self._answered)
        while self._timeout:
            try:
                await self._ask_patiently()
            except Exception as error:  # noqa: BLE001 - vLLM notices itself that an engine is dead
                logger.warning("expo: the engine could not be asked whether it lives: %s", error)
                if getattr(self._client, "errored", True):
                    return
            await asyncio.sleep(self._interval)

    async def _ask_patiently(self) -> None:
        """Ask; until the answer comes, look whether that is because the engines compute."""
        asked = time.monotonic()
        question = asyncio.ensure_future(self._ask())
        try:
            while not (await asyncio.wait((question,), timeout=self._interval))[0]:
                if self._is_computing is not None and self._is_computing(asked):
                    self._note_life()
            await question
        finally:
            question.cancel()

    async def _ask(self) -> None:
        await call_engines(self._client, "is_sleeping")
        self._reporter.update(core_answered=time.monotonic())
        await call_ranks(self._client, ALIVE_METHOD)
        self._note_life()

    def _note_life(self) -> None:
        self._answered = time.monotonic()
        self._reporter.update(answered=self._answered)
