"""Observes one alpha after another: loads it, asks, and keeps what came back. What is there already is left alone."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

from expo_serve.config import format_alpha
from expo_serve.errors import LoadError, UsageError, count_of
from expo_serve.report import DeploymentReport
from expo_serve.sweep.client import Client, Generated, Rejected, ask_all
from expo_serve.sweep.engine import Engine
from expo_serve.sweep.lm_eval import run_lm_eval
from expo_serve.sweep.meter import Meter
from expo_serve.sweep.observations import (
    Answer,
    Failure,
    Loaded,
    Observation,
    ReferenceLogprobs,
    TextLogprob,
)
from expo_serve.sweep.prompts import Prompt, read_texts, windows
from expo_serve.sweep.settings import WINDOW_TOKENS, SweepSettings
from expo_serve.sweep.store import Store

Use = Literal["prompt", "refusal"]
_NOT_TEXT = "the prompt has parts that are not text, which token ids do not hold"
_CHECKED = 8
"""Answers at alpha 0 that are scored again when its weights are back."""
_SAME_NATS = 0.1
"""Their log-probabilities may differ by this on average: requests that are computed together round differently."""


class Observer:
    """Observes alphas with one engine.

    Args:
        engine: the engine, started.
        store: takes what is observed.
        settings: what to ask.
        prompts: of ``--prompts``.
        refusals: of ``--refusals``.
        meter: shows the progress.
        say: prints one line.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        settings: SweepSettings,
        prompts: Sequence[Prompt],
        refusals: Sequence[Prompt],
        meter: Meter,
        say: Callable[[str], None],
    ) -> None:
        self._engine, self._store, self._settings = engine, store, settings
        self._asked: dict[Use, Sequence[Prompt]] = {"prompt": prompts, "refusal": refusals}
        self._meter, self._say = meter, say
        self._length = engine.max_length()
        self._is_chat = self._has_chat_template()
        self._room = {use: self._measure_room(use) for use in self._asked}
        """By use and prompt: how many tokens an answer may have."""
        self._windows = self._cut_text()

    def observe(self, alpha: float) -> None:
        """Observe one alpha, or what is missing of it.

        Raises:
            LoadError: its weights could not be loaded.
            ServeError: the engine is gone.
            ExpoError: what was observed cannot be written.
        """
        seconds = self._load(alpha)
        report = self._engine.report()
        started = time.monotonic()
        self._generate(alpha, "prompt")
        generated = time.monotonic() - started
        self._generate(alpha, "refusal")
        self._score_text(alpha)
        self._ask_questions(alpha)
        self._store.add(
            Loaded(
                alpha=alpha,
                effective_alpha=report.effective_alpha,
                deployment_id=report.deployment_id,
                load_seconds=seconds,
                generate_seconds=generated,
                cpu_weight_bytes=_host_bytes(report),
            )
        )

    def compare_with_zero(self) -> None:
        """Score all answers under alpha 0, loaded once more.

        Raises:
            LoadError: the weights of alpha 0 are not what they were.
            ServeError: the engine is gone.
        """
        done = compared_with_zero(self._store.observations)
        left = [one for one in self._answers() if one.alpha and (one.alpha, one.prompt) not in done]
        for one in [one for one in left if not self._is_text(one)]:
            left.remove(one)
            self._store.add(Failure(alpha=one.alpha, use="reference", prompt=one.prompt, reason=_NOT_TEXT))
        if not left:
            return
        self._load(0.0)
        self._check_zero()
        self._meter.begin("scoring the answers under alpha 0", len(left))
        for answer, found in ask_all(self._engine.endpoint, left, _ask_logprobs):
            self._meter.advance()
            self._store.add(self._reference(answer, found))

    def _is_text(self, answer: Answer) -> bool:
        return self._asked["prompt"][answer.prompt].is_text

    def _load(self, alpha: float) -> float:
        """Load an alpha, unless the engine has it; returns the seconds of the load."""
        if alpha != self._engine.config.alpha:
            return self._engine.load(alpha)
        return max(rank.total_seconds for rank in self._engine.report().ranks)

    def _answers(self, use: Use = "prompt") -> list[Answer]:
        return [one for one in self._store.observations if isinstance(one, Answer) and one.use == use]

    def _generate(self, alpha: float, use: Use) -> None:
        done = {one.prompt for one in self._answers(use) if one.alpha == alpha}
        done |= {prompt for found, prompt in _failed(self._store.observations, use) if found == alpha}
        left = [prompt for prompt in self._asked[use] if prompt.index not in done]
        what = "answers" if use == "prompt" else "answers to --refusals"
        self._meter.begin(f"alpha {format_alpha(alpha)}: {what}", len(left), is_most=use == "prompt")
        for prompt in [prompt for prompt in left if self._room[use][prompt.index] < 1]:
            left.remove(prompt)
            reason = f"the prompt is as long as the model takes ({self._length} tokens with its answer)"
            self._store.add(Failure(alpha=alpha, use=use, prompt=prompt.index, reason=reason))
        ask = partial(self._ask, use)
        for prompt, found in ask_all(self._engine.endpoint, left, ask):
            self._meter.advance()
            if isinstance(found, Rejected):
                self._store.add(Failure(alpha=alpha, use=use, prompt=prompt.index, reason=found.reason))
            else:
                self._store.add(Answer(alpha=alpha, use=use, prompt=prompt.index, **vars(found)))

    async def _ask(self, use: Use, client: Client, prompt: Prompt) -> Generated | Rejected:
        settings = self._settings
        return await client.generate(
            self._messages(prompt),
            prompt.text,
            max_tokens=min(settings.max_tokens, self._room[use][prompt.index]),
            temperature=settings.temperature,
            seed=zlib.crc32(f"{settings.seed}:{use}:{prompt.index}".encode()) >> 1,
        )

    def _messages(self, prompt: Prompt) -> Sequence[dict[str, Any]] | None:
        return prompt.messages if self._is_chat else None

    def _has_chat_template(self) -> bool:
        """Return whether prompts are asked as chats; a model without a template continues them as text.

        Raises:
            UsageError: the template refuses the chat, or prompts need one that is not there.
        """
        replies = ask_all(self._engine.endpoint, self._asked["prompt"], lambda client, one: client.count(one.messages))
        refused = [found for _, found in replies if isinstance(found, Rejected)]
        if len(refused) < len(self._asked["prompt"]):
            return True
        everything = [prompt for prompts in self._asked.values() for prompt in prompts]
        if "chat template" not in refused[0].reason or any(len(prompt.messages) > 1 for prompt in everything):
            raise UsageError(f"--prompts: the model takes none of the chats: {refused[0].reason}")
        self._say("the model has no chat template: it continues the prompts as text")
        return False

    def _measure_room(self, use: Use) -> dict[int, int]:
        async def count(client: Client, prompt: Prompt) -> int | Rejected:
            return await client.count(self._messages(prompt), prompt.text)

        room = {}
        for prompt, found in ask_all(self._engine.endpoint, self._asked[use], count):
            # One more is needed to score the whole answer later.
            room[prompt.index] = self._settings.max_tokens if isinstance(found, Rejected) else self._length - found - 1
        short = [left for left in room.values() if left < self._settings.max_tokens]
        if short:
            self._say(
                f"{count_of(len(short), 'prompt leaves', 'prompts leave')} less room than --max-tokens "
                f"{self._settings.max_tokens} within {self._length} tokens, {max(0, min(short))} at the least: answers "
                "are cut there"
            )
        return room

    def _cut_text(self) -> list[Sequence[int]]:
        if self._settings.text is None:
            return []
        texts = read_texts(self._settings.text)
        replies = ask_all(self._engine.endpoint, list(enumerate(texts)), _ask_tokens)
        by_text: dict[int, list[int]] = {}
        for (index, _), found in replies:
            if isinstance(found, Rejected):
                raise UsageError(f"--text: the model's tokenizer does not take it: {found.reason}")
            by_text[index] = found
        length = min(WINDOW_TOKENS, self._length - 1)
        return [window for index in sorted(by_text) for window in windows(by_text[index], length)]

    def _score_text(self, alpha: float) -> None:
        done = {one.line for one in self._store.observations if isinstance(one, TextLogprob) and one.alpha == alpha}
        done |= {line for found, line in _failed(self._store.observations, "text") if found == alpha}
        left = [(line, window) for line, window in enumerate(self._windows) if line not in done]
        self._meter.begin(f"alpha {format_alpha(alpha)}: held-out text", len(left))
        for (line, _), found in ask_all(self._engine.endpoint, left, _ask_window):
            self._meter.advance()
            if isinstance(found, Rejected):
                self._store.add(Failure(alpha=alpha, use="text", prompt=line, reason=found.reason))
            else:
                self._store.add(TextLogprob(alpha=alpha, line=line, logprob=sum(found), tokens=len(found)))

    def _ask_questions(self, alpha: float) -> None:
        if not self._settings.lm_eval:
            return
        self._meter.begin(f"alpha {format_alpha(alpha)}: lm-eval", 0)
        folder = self._store.folder / "lm-eval" / format_alpha(alpha)
        tasks = self._settings.lm_eval
        for _ in self._store.add_all(run_lm_eval(tasks, self._engine.endpoint, folder)):
            pass  # those of a run that was cut short are replaced

    def _reference(self, answer: Answer, found: list[float] | Rejected) -> Observation:
        if isinstance(found, Rejected):
            return Failure(alpha=answer.alpha, use="reference", prompt=answer.prompt, reason=found.reason)
        return ReferenceLogprobs(alpha=answer.alpha, prompt=answer.prompt, logprobs=tuple(_of_answer(answer, found)))

    def _check_zero(self) -> None:
        """Compare a few answers at alpha 0 with themselves: nothing of another alpha may be left in the weights."""
        mine = [one for one in self._answers() if one.alpha == 0 and one.tokens and self._is_text(one)][:_CHECKED]
        away: list[float] = []
        for answer, found in ask_all(self._engine.endpoint, mine, _ask_logprobs):
            if not isinstance(found, Rejected):
                pairs = zip(_of_answer(answer, found), answer.logprobs, strict=True)
                away += [abs(again - before) for again, before in pairs]
        if away and sum(away) / len(away) > _SAME_NATS:
            raise LoadError(
                "alpha 0, loaded again, gives its own answers other probabilities than before, by "
                f"{sum(away) / len(away):.2g} nats a token: what was loaded in place is wrong; please report this"
            )


def compared_with_zero(observations: Iterable[Observation]) -> set[tuple[float, int]]:
    """Return the answers, by alpha and prompt, that need not be scored under alpha 0 any more."""
    observations = list(observations)
    done = {(one.alpha, one.prompt) for one in observations if isinstance(one, ReferenceLogprobs)}
    return done | _failed(observations, "reference")


def _host_bytes(report: DeploymentReport) -> int | None:
    if any(rank.peak_device_memory_bytes is not None for rank in report.ranks):
        return None
    return sum(rank.weight_bytes for rank in report.ranks)


def _of_answer(answer: Answer, logprobs: Sequence[float]) -> Sequence[float]:
    """Return the part of the log-probabilities of prompt and answer that is the answer's."""
    return logprobs[len(logprobs) - len(answer.tokens) :]


async def _ask_logprobs(client: Client, answer: Answer) -> list[float] | Rejected:
    return await client.logprobs([*answer.prompt_tokens, *answer.tokens])


async def _ask_window(client: Client, item: tuple[int, Sequence[int]]) -> list[float] | Rejected:
    return await client.logprobs(item[1])


async def _ask_tokens(client: Client, item: tuple[int, str]) -> list[int] | Rejected:
    return await client.tokens(item[1])


def _failed(observations: Iterable[Observation], use: str) -> set[tuple[float, int]]:
    return {(one.alpha, one.prompt) for one in observations if isinstance(one, Failure) and one.use == use}
