"""What one case came to, as the line of JSON that its process ends with. Imports nothing but Python's own."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["right", "measured", "wrong", "skipped", "failed", "crashed", "timed out"]
BAD: tuple[Status, ...] = ("wrong", "failed", "crashed", "timed out")
"""With one of these the command ends with exit code 1."""


class Skipped(Exception):
    """A case cannot be done on this machine; says why."""


@dataclass(frozen=True)
class Outcome:
    """The result of a case: a crash and a skip are results too."""

    case: str
    status: Status
    reason: str = ""
    """What was wrong, or why there is no answer."""
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_bad(self) -> bool:
        """Whether something was found, or should have been."""
        return self.status in BAD

    def line(self) -> str:
        """The outcome as one line of JSON."""
        return json.dumps(asdict(self))


def judged(case: str, figures: dict[str, Any]) -> Outcome:
    """The outcome of a case that came to its end: its figures may hold ``wrong``, a list of sentences.

    A case without that list only measures.
    """
    wrong = figures.get("wrong")
    if wrong is None:
        return Outcome(case, "measured", figures=figures)
    return Outcome(case, "wrong" if wrong else "right", "; ".join(wrong[:3]), figures)


def last_outcome(output: str) -> Outcome | None:
    """The outcome among the lines of an output; libraries may say something after it."""
    for line in reversed(output.splitlines()):
        if line.startswith('{"case":'):
            try:
                return Outcome(**json.loads(line))
            except (ValueError, TypeError):
                continue
    return None
