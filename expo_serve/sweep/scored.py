"""What every reward is: it takes answers and yields what it found, one by one, so that nothing is asked twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from expo_serve.errors import ExpoError
from expo_serve.sweep.observations import Failure, Preference, Score

Found = Score | Preference | Failure


@dataclass(frozen=True)
class Scored:
    """One answer to score."""

    alpha: float
    prompt: int
    """Index of the prompt, the same at every alpha."""
    messages: Sequence[dict[str, Any]]
    """The chat that was answered, as OpenAI's API has it."""
    answer: str
    reference: str | None = None
    """The answer to the same prompt at alpha 0; None where there is none."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Other keys of the prompt's line, such as a gold answer."""

    @property
    def question(self) -> str:
        """The last message of the user, without its images and other parts."""
        return question_in(self.messages)

    def failure(self, reward: str, reason: str) -> Failure:
        """Return the failure of a reward for this answer.

        Args:
            reward: as on the command line.
            reason: why; cut to one line.
        """
        line = shorten(reason)
        return Failure(alpha=self.alpha, use="reward", prompt=self.prompt, reason=line, reward=reward)


class Reward(Protocol):
    """One ``--reward``. It is checked where it is opened, before any engine starts."""

    spec: str
    """As on the command line; it is in every result."""
    is_late: bool
    """Whether it needs the place of the engine under test, and so scores once that is gone."""

    def score(self, items: Sequence[Scored]) -> Iterator[Found]:
        """Yield one result for each item, in any order, as they come.

        Raises:
            ExpoError: the reward is of no use any more; items without a result may be given again.
        """
        ...


def shorten(text: str, length: int = 300) -> str:
    """Return a text as one line, cut to a length."""
    return " ".join(text.split())[:length]


def question_in(messages: Sequence[dict[str, Any]]) -> str:
    """Return the last message of the user in a chat, without its images and other parts."""
    asked = [message for message in messages if message["role"] == "user"]
    return text_of((asked or messages)[-1])


def text_of(message: dict[str, Any]) -> str:
    """Return the text of a chat message, without its images and other parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or "")


class Patience:
    """Holds failures back until a reward has worked once; too many of them from the start are an error.

    A reward that never works shall leave no failures behind: they would count as scored when the sweep is resumed.

    Args:
        limit: so many failures from the start are too many.
        give_up: makes the error, from the last failure.
    """

    def __init__(self, limit: int, give_up: Callable[[Failure], ExpoError]) -> None:
        self._limit, self._give_up = limit, give_up
        self._failures = 0
        """Since the start; a reward that works once is trusted from then on."""
        self._has_worked = False

    def watch(self, found: Iterable[Found]) -> Iterator[Found]:
        """Yield results as they come.

        Raises:
            ExpoError: made by ``give_up``; the failures that were held back are not yielded.
        """
        held: list[Failure] = []
        for result in found:
            if isinstance(result, Failure) and not self._has_worked:
                held.append(result)
                self._failures += 1
                if self._failures >= self._limit:
                    raise self._give_up(result)
                continue
            self._has_worked = True
            yield from held
            held = []
            yield result
        yield from held
