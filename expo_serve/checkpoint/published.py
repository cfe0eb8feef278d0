"""Published pairs: checkpoints before and after alignment, with the alpha that the authors of ExPO found for them.

The data is ``published.json`` beside this file: alphas from the tables of arXiv 2404.16792, formats from stored pages
of the hub. What is not known says so.
"""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from expo_serve.errors import UsageError

_MOST_NAMED = 3


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PublishedFiles(_Record):
    """How one side is stored on the main branch of its repository."""

    format: Literal["safetensors", ".bin"] | None
    """``.bin`` where there are no safetensors; None where it is not known."""
    conversions: tuple[int, ...]
    """Numbers of the pull requests in which the hub's own converter offers safetensors."""
    note: str
    """How far it is known; empty where a list of the files was seen."""

    @property
    def text(self) -> str:
        """The format in a few words, for a table: ``.bin, PR 2, 4``."""
        if self.format is None:
            return self.note
        pulls = [f"PR {', '.join(map(str, self.conversions))}"] if self.conversions else []
        return ", ".join([self.format, *pulls, *([self.note] if self.note else [])])


class PublishedPair(_Record):
    """One pair; its name is the last part of aligned's hub id."""

    base: str
    """Hub id."""
    aligned: str
    """Hub id."""
    alpha: float | None
    """The best alpha that the authors found; None where they found none that helps."""
    source: str
    """Where ``alpha`` was published."""
    base_files: PublishedFiles
    aligned_files: PublishedFiles

    @computed_field  # type: ignore[prop-decorator]
    @property
    def name(self) -> str:
        """What ``--pair`` takes."""
        return self.aligned.rsplit("/", 1)[-1]

    @property
    def access_flags(self) -> list[str]:
        """The flags without which a side that has only ``.bin`` files is refused; empty if none is known to need one.

        A conversion is a revision of the repository: the newest is named. Where there is none, the ``.bin`` files
        themselves are read.
        """
        flags: list[str] = []
        sides = {"base": self.base_files, "aligned": self.aligned_files}
        pickles = {side: there for side, there in sides.items() if there.format == ".bin"}
        for side, there in pickles.items():
            if there.conversions:
                flags += [f"--{side}-revision", f"refs/pr/{max(there.conversions)}"]
        needs_pickles = any(not there.conversions for there in pickles.values())
        return [*flags, "--allow-pickle-index"] if needs_pickles else flags


class PublishedPairs(_Record):
    """The content of ``published.json``."""

    schema_version: Literal[1]
    looked_up: str
    """Date on which the formats were looked up, YYYY-MM-DD."""
    looked_up_in: str
    """Where they were looked up."""
    measured_by: str
    """By what the authors chose their alphas."""
    pairs: tuple[PublishedPair, ...]


@cache
def published_pairs() -> PublishedPairs:
    """Return all published pairs, in the order of their tables."""
    return PublishedPairs.model_validate_json(Path(__file__).with_name("published.json").read_bytes())


def find_pair(given: object, where: str) -> PublishedPair:
    """Return the pair of a name, in large or small letters; aligned's whole hub id is a name of it too.

    Args:
        given: the name.
        where: what gave it, for the message, for example ``--pair``.

    Raises:
        UsageError: there is no such pair; names those that are spelt alike.
    """
    wanted = str(given).strip().lower()
    pairs = published_pairs().pairs
    for pair in pairs:
        if wanted in (pair.name.lower(), pair.aligned.lower()):
            return pair
    near = _alike(wanted.rsplit("/", 1)[-1], [pair.name for pair in pairs])
    meant = f"; did you mean {', '.join(near)}?" if near else ";"
    raise UsageError(f"{where}: no published pair is named {str(given)!r:.100}{meant} expo-serve pairs lists all")


def _alike(wanted: str, names: list[str]) -> list[str]:
    """Return names that begin with or hold what was asked for, else those that are spelt nearly so."""
    holding = [name for name in names if wanted and wanted in name.lower()]
    lower = {name.lower(): name for name in names}
    close = [lower[name] for name in get_close_matches(wanted, lower, n=_MOST_NAMED)]
    return list(dict.fromkeys([*close, *holding]))[:_MOST_NAMED]
