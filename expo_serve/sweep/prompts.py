"""Reads what a sweep asks: prompts, prompts that invite refusals, and held-out text."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from expo_serve.errors import UsageError
from expo_serve.sweep.scored import question_in

LINE_EXPECTED = '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'


@dataclass(frozen=True)
class Prompt:
    """One prompt, a chat."""

    index: int
    """Within the selection, from 0."""
    messages: tuple[dict[str, Any], ...]
    """As OpenAI's API has them; the system prompt, where there is one, is the first."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Other keys of the line, such as a gold answer, for rewards."""

    @property
    def is_text(self) -> bool:
        """Whether it has no parts but text."""
        return all(isinstance(message["content"], str) for message in self.messages)

    @property
    def text(self) -> str:
        """The last message of the user, without its images and other parts."""
        return question_in(self.messages)


class _Line(BaseModel):
    model_config = ConfigDict(extra="allow")

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _check(self) -> _Line:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("one of prompt and messages")
        if self.messages is not None and not (self.messages and all(map(_is_message, self.messages))):
            raise ValueError("messages with role and content")
        return self


def _is_message(message: dict[str, Any]) -> bool:
    return isinstance(message.get("role"), str) and isinstance(message.get("content"), str | list)


def read_prompts(
    file: Path, flag: str, count: int | None = None, seed: int = 0, system: str | None = None
) -> list[Prompt]:
    """Read a JSONL file of prompts.

    Args:
        file: one object a line; empty lines are skipped.
        flag: that named the file, for messages.
        count: take so many, drawn at random, in the file's order; all by default.
        seed: of the draw.
        system: system prompt of every chat that has none of its own.

    Raises:
        UsageError: the file cannot be read, a line is not a prompt, or there are fewer prompts than ``count``.
    """
    lines = [(number, line) for number, line in enumerate(_lines(file, flag), 1) if line.strip()]
    if not lines:
        raise UsageError(f"{flag}: {file} has no prompts; expected lines of {LINE_EXPECTED}")
    if count is not None:
        if count > len(lines):
            raise UsageError(f"--n: {file} has {len(lines)} prompts, fewer than {count}")
        lines = sorted(random.Random(seed).sample(lines, count))
    return [
        _prompt(index, line, f"{flag}: {file}, line {number}", system) for index, (number, line) in enumerate(lines)
    ]


def _prompt(index: int, line: str, where: str, system: str | None) -> Prompt:
    try:
        read = _Line.model_validate(json.loads(line))
        json.dumps([read.prompt, read.messages], ensure_ascii=False).encode()  # half of a surrogate pair cannot be sent
    except (ValueError, ValidationError, RecursionError):
        raise UsageError(f"{where}: expected {LINE_EXPECTED}, found {line.strip()!r:.80}") from None
    messages = read.messages if read.messages is not None else [{"role": "user", "content": read.prompt}]
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Prompt(index, tuple(messages), dict(read.model_extra or {}))


def read_texts(file: Path, flag: str = "--text") -> list[str]:
    """Read held-out text: a ``.jsonl`` file has one object with ``text`` a line, any other file is one text.

    Raises:
        UsageError: the file cannot be read, is empty, or a line has no text.
    """
    lines = _lines(file, flag)
    if file.suffix != ".jsonl":
        texts = ["\n".join(lines).rstrip("\n")]
    else:
        texts = [_text(line, f"{flag}: {file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UsageError(f"{flag}: {file} has no text")
    return texts


def _text(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise UsageError(f'{where}: expected {{"text": "..."}}, found {line.strip()!r:.80}')
    return text


def _lines(file: Path, flag: str) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").split("\n")  # splitlines() cuts at characters that JSON may hold
    except OSError as error:
        raise UsageError(f"{flag}: {file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"{flag}: {file} is not UTF-8 text") from None


def digest(file: Path | None) -> str | None:
    """Return the first 16 hexadecimal digits of a file's SHA-256; None without a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file else None


def windows(tokens: Sequence[int], length: int) -> list[Sequence[int]]:
    """Cut the tokens of a text into windows whose log-probabilities are measured, none shorter than two tokens.

    The window length, not the text's, decides how much context a token has, so it has to be the same everywhere.
    """
    cut = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    return [window for window in cut if len(window) > 1]
