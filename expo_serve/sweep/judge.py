"""``--reward openai:URL,MODEL``: a judge at any OpenAI-compatible chat endpoint, which compares answers in pairs.

Each answer is compared with the answer at alpha 0 to the same prompt, once as A and once as B, since judges favour a
place (arXiv 2306.05685, 3.3); the value is the mean of both. Texts that are the same are 0.5 and are not asked about.
Whatever the judge has said is kept in a file, so that an interrupted sweep asks nothing twice.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from expo_serve import errors
from expo_serve.errors import ServeError, UsageError, count_of
from expo_serve.sweep.at_once import ask_at_once
from expo_serve.sweep.cache import Cache, digest_of
from expo_serve.sweep.comparison import compose
from expo_serve.sweep.judge_client import JudgeClient, NoVerdict
from expo_serve.sweep.observations import Failure, Preference
from expo_serve.sweep.scored import Found, Patience, Scored

if TYPE_CHECKING:
    import openai

AT_ONCE = 8
"""Requests under way; as many that stay without an answer, one after another, mean that the judge is gone."""
FIRST = 10
"""So many failures from the start are the judge's fault, not the answers'."""
_TRIAL = compose([{"role": "user", "content": "What is two plus two?"}], "Four.", "Five.")


@dataclass(frozen=True)
class _Question:
    """One comparison in one order."""

    item: Scored
    is_first: bool
    """Whether the answer at ``alpha`` is shown as A."""

    @property
    def messages(self) -> list[dict[str, str]]:
        pair = (self.item.answer, self.item.reference or "")
        return compose(self.item.messages, *(pair if self.is_first else pair[::-1]))


_Reply = tuple[_Question, float | NoVerdict]


class Judge:
    """A judge as a reward.

    Args:
        spec: as on the command line.
        client: the judge's address.
        cache: keeps what it said.
        at_once: requests at once at most.
    """

    is_late = False

    def __init__(self, spec: str, client: JudgeClient, cache: Cache, at_once: int = AT_ONCE) -> None:
        self.spec = spec
        self._client, self._cache, self._at_once = client, cache, at_once
        self._patience = Patience(FIRST, self._give_up)

    def check(self) -> None:
        """Ask one question, to see whether key, address and model are right.

        A judge that fails for the time being passes, and one that decides nothing: the first answers will show.

        Raises:
            UsageError: they are not.
        """
        client = JudgeClient(self._client.url, self._client.model, retries=2, answer_seconds=60)
        try:
            (reply,) = ask_at_once(client.connect, [_TRIAL], client.ask, 1)
        except ServeError as error:
            raise UsageError(f"--reward {self.spec}: {error.message}") from None
        if isinstance(reply, NoVerdict) and reply.kind in ("refused", "malformed", "unreachable"):
            raise UsageError(
                f"--reward {self.spec}: the judge does not answer: {reply.reason}; check the address, which mostly "
                "ends in /v1, and that it is there"
            )

    def score(self, items: Sequence[Scored]) -> Iterator[Found]:
        """Yield a preference over the answer at alpha 0 for each answer, or a failure where the judge decides nothing.

        Raises:
            ServeError: the judge is gone, refuses everything, or decided nothing from the start. What it said before is
                kept.
        """
        left: list[Scored] = []
        for item in items:
            known = self._known(item)
            if known is None:
                left.append(item)
            else:
                yield known
        asked, failed = self._client.asked, self._client.failed
        try:
            with closing(self._compare(left)) as results:
                yield from self._patience.watch(results)
        finally:
            if failed := self._client.failed - failed:
                asked = self._client.asked - asked
                errors.warn(f"{self._name}: {failed} of {count_of(asked, 'request')} failed on the way")

    @property
    def _name(self) -> str:
        return f"the judge {self._client.model} at {self._client.url}"

    def _known(self, item: Scored) -> Found | None:
        """Return a result that needs no question."""
        if item.reference is None:
            return item.failure(self.spec, "there is no answer at alpha 0 to compare with")
        if item.alpha == 0 or item.answer.strip() == item.reference.strip():
            return self._preference(item, 0.5)
        kept = [self._kept(question) for question in _questions(item)]
        return None if None in kept else self._result(item, [value for value in kept if value is not None])

    def _kept(self, question: _Question) -> float | None:
        """Return what the judge has said before: how much it prefers the answer at ``alpha``."""
        value = self._cache.get(self._key(question))
        return value if isinstance(value, float) else None

    def _key(self, question: _Question) -> str:
        return digest_of(url=self._client.url, model=self._client.model, messages=question.messages)

    def _compare(self, items: Sequence[Scored]) -> Generator[Found, None, None]:
        """Ask about items in both orders, and yield each with its second reply.

        Failures for want of an answer are held back until the judge answers again.

        Raises:
            ServeError: it does not.
        """
        questions = [question for item in items for question in _questions(item)]
        with closing(ask_at_once(self._client.connect, questions, self._ask, self._at_once)) as replies:
            yield from self._pair(replies)

    def _pair(self, replies: Iterable[_Reply]) -> Iterator[Found]:
        one_order: dict[int, float | NoVerdict] = {}
        """By the item: what was said in the order that was answered first."""
        held: list[Found] = []
        unanswered: list[NoVerdict] = []
        """The last replies, as far as they are none."""
        has_answered = False
        for question, reply in replies:
            if isinstance(reply, NoVerdict) and reply.is_unanswered:
                unanswered.append(reply)
            else:
                unanswered, has_answered = [], True
            if len(unanswered) >= self._at_once:
                raise self._gone(unanswered[-1])
            item = question.item
            if id(item) in one_order:
                held.append(self._result(item, (one_order.pop(id(item)), reply)))
            else:
                one_order[id(item)] = reply
            if not unanswered:
                yield from held
                held = []
        if unanswered and (not has_answered or unanswered[-1].kind == "unreachable"):
            raise self._gone(unanswered[-1])
        yield from held

    async def _ask(self, connection: openai.AsyncOpenAI, question: _Question) -> _Reply:
        kept = self._kept(question)
        if kept is not None:
            return question, kept
        reply = await self._client.ask(connection, question.messages)
        if isinstance(reply, NoVerdict):
            return question, reply
        value = reply if question.is_first else 1 - reply
        self._cache.put(self._key(question), value)
        return question, value

    def _result(self, item: Scored, both: Sequence[float | NoVerdict]) -> Found:
        for reply in both:
            if isinstance(reply, NoVerdict):
                return item.failure(self.spec, reply.reason)
        return self._preference(item, sum(value for value in both if not isinstance(value, NoVerdict)) / len(both))

    def _preference(self, item: Scored, value: float) -> Preference:
        return Preference(alpha=item.alpha, prompt=item.prompt, reward=self.spec, value=value)

    def _gone(self, reply: NoVerdict) -> ServeError:
        return ServeError(
            f"{self._name} does not answer any more: {reply.reason}; what it has said is kept: see to it, then go on "
            "with --resume"
        )

    def _give_up(self, failure: Failure) -> ServeError:
        return ServeError(
            f"{self._name} has decided none of the first {FIRST} comparisons, at last: {failure.reason}; give a judge "
            "that follows instructions, then go on with --resume"
        )


def _questions(item: Scored) -> list[_Question]:
    return [_Question(item, True), _Question(item, False)]


def open_judge(rest: str, file: Path) -> Judge:
    """Open the judge of ``openai:URL,MODEL``, and ask it a question on trial.

    Args:
        rest: ``URL,MODEL``; ``/v1`` may be left out where the URL has no path.
        file: keeps what it says.

    Raises:
        UsageError: there is no such judge.
    """
    spec = f"openai:{rest}"
    judge = Judge(spec, JudgeClient(*_parse(rest, spec)), Cache(file))
    judge.check()
    return judge


def _parse(rest: str, spec: str) -> tuple[str, str]:
    """Return the URL and the model."""
    url, _, model = rest.partition(",")
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_whole = False
    if not is_whole or not model:
        raise UsageError(
            f"--reward {spec}: expected openai:URL,MODEL, such as openai:http://127.0.0.1:8000/v1,my-model"
        )
    if "@" in parts.netloc:
        raise UsageError("--reward openai: leave name and password out of the URL; a key is taken from OPENAI_API_KEY")
    url = url.rstrip("/").removesuffix("/chat/completions")
    return (f"{url}/v1" if parts.path in ("", "/") else url), model
