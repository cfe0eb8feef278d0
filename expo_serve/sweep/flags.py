"""vLLM's flags as a sweep was given them, for those who repeat some of them: each with its values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_FLAG = re.compile(r"--?[A-Za-z]")
WITHOUT_NEGATION = frozenset(
    {"aggregate-engine-logging", "data-parallel-multi-port-external-lb", "disable-log-stats", "grpc", "headless"}
)
"""vLLM's switches that have no ``--no-`` form: left out, they are off."""


@dataclass(frozen=True)
class Flag:
    """A flag and its values."""

    name: str
    """Without leading hyphens, with hyphens for underscores."""
    words: tuple[str, ...]
    """As on the command line: the flag, with its value behind ``=`` or in the words that follow."""

    @property
    def values(self) -> tuple[str, ...]:
        """Its values; empty for a switch."""
        _, equals, value = self.words[0].partition("=")
        return (value, *self.words[1:]) if equals else self.words[1:]


def read_flags(arguments: Iterable[str], file_options: Mapping[str, Any] | None = None) -> list[Flag]:
    """Return the flags of a command line, those of a ``--config`` file before them.

    Args:
        arguments: vLLM's part of the command line.
        file_options: vLLM's keys of the file.
    """
    found: list[list[str]] = []
    for word in (*_as_words(file_options or {}), *arguments):
        if _FLAG.match(word) or not found:
            found.append([word])
        else:
            found[-1].append(word)
    return [Flag(_name(words[0]), tuple(words)) for words in found]


def _name(word: str) -> str:
    return word.split("=")[0].lstrip("-").replace("_", "-")


def _as_words(options: Mapping[str, Any]) -> list[str]:
    """Write the keys of a file as flags, by vLLM's own rules for its ``--config``."""
    words: list[str] = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if value is True:
            words.append(f"--{name}")
        elif value is False:
            words += [] if name in WITHOUT_NEGATION else [f"--no-{name}"]
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)] if value else []
        else:
            words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words
