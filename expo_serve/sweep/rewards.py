"""What every reward is: it takes answers and yields what it found, one by one, so that nothing is asked twice.

``expo_serve.sweep.reward_spec`` opens the one that a ``--reward`` names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

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
        asked = [message for message in self.messages if message["role"] == "user"]
        return text_of((asked or self.messages)[-1])

    def failure(self, reward: str, reason: str) -> Failure:
        """Return the failure of a reward for this answer.

        Args:
            reward: as on the command line.
            reason: why; cut to one line.
        """
        line = " ".join(reason.split())[:300]
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


def text_of(message: dict[str, Any]) -> str:
    """Return the text of a chat message, without its images and other parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or "")
