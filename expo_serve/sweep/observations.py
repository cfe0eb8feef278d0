"""What a sweep observes, one line of ``answers.jsonl`` each: answers, scores of rewards, held-out text, questions.

Lines are appended as they are observed, and ``--resume`` reads them again; so each says by itself what it is of.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class _Observation(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    alpha: float


class Answer(_Observation):
    """One sampled answer to one prompt."""

    kind: Literal["answer"] = "answer"
    use: Literal["prompt", "refusal"] = "prompt"
    """Which file the prompt is from: ``--prompts``, or ``--refusals``, to whose answers only over-refusal applies."""
    prompt: int
    """Index of the prompt in its file's selection, from 0; the same prompt at every alpha."""
    text: str
    prompt_tokens: tuple[int, ...]
    """Token ids of the prompt, with the chat template applied."""
    tokens: tuple[int, ...]
    """Token ids of the answer, with the end mark if the model set one."""
    logprobs: tuple[float, ...]
    """Natural log-probabilities of ``tokens`` under the sampling model before temperature; one for each token."""
    finish_reason: str
    """vLLM's: ``stop``, or ``length`` for an answer that was cut at the limit."""


class ReferenceLogprobs(_Observation):
    """Log-probabilities of an answer's tokens under alpha 0."""

    kind: Literal["reference"] = "reference"
    prompt: int
    logprobs: tuple[float, ...]
    """Natural logarithms; one for each token of the answer at ``alpha`` to this prompt."""


class Score(_Observation):
    """One reward of one answer."""

    kind: Literal["score"] = "score"
    prompt: int
    reward: str
    """The ``--reward`` that gave it, as on the command line."""
    value: float


class Preference(_Observation):
    """A judge's choice between an answer at ``alpha`` and the one at alpha 0, over both orders."""

    kind: Literal["preference"] = "preference"
    prompt: int
    reward: str
    value: float
    """Share of the orders in which the answer at ``alpha`` won: 0, 0.5 or 1, or a probability."""


class TextLogprob(_Observation):
    """Log-probability of one text of ``--text``."""

    kind: Literal["text"] = "text"
    line: int
    logprob: float
    """Sum of the natural log-probabilities of all tokens but the first."""
    tokens: int
    """How many were summed."""


class Question(_Observation):
    """One question of one task of lm-evaluation-harness."""

    kind: Literal["question"] = "question"
    task: str
    question: str
    """The harness's id of the question within its task."""
    correct: float
    """Its score of the task's main metric: mostly 0 or 1."""


class Loaded(_Observation):
    """The weights of one alpha, loaded in place; ends the observations of an alpha when ``complete``."""

    kind: Literal["loaded"] = "loaded"
    effective_alpha: float | None
    deployment_id: str
    load_seconds: float
    generate_seconds: float | None = None
    """Of all answers to ``--prompts``; None before they are complete."""
    cpu_weight_bytes: int | None = None
    """Size of the parameters of all ranks where they are in host memory; None on GPUs."""


class Failure(_Observation):
    """A prompt, a text or a question that failed; it is counted, and left out at this alpha."""

    kind: Literal["failure"] = "failure"
    use: Literal["prompt", "refusal", "text", "reward", "reference", "task"]
    prompt: int
    reason: str
    """One line."""
    reward: str | None = None
    """The ``--reward`` that failed; None where it was none."""


Observation = Annotated[
    Answer | ReferenceLogprobs | Score | Preference | TextLogprob | Question | Loaded | Failure,
    Field(discriminator="kind"),
]
OBSERVATION: TypeAdapter[Observation] = TypeAdapter(Observation)
