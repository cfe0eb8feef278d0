"""What all load tests share: whose turn it is, the spread of a series, result files, tables, options."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loadtests.machine import describe

RESULTS = Path(__file__).parent / "results"
WORK = Path(".bench")
ALPHA = 0.5


@contextmanager
def workplace(work: Path, name: str) -> Iterator[Path]:
    """An empty folder for what a script writes beside its results, removed in the end: nothing old is measured."""
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def turns(names: list[str], rounds: int) -> list[str]:
    """Every name once a round; who begins changes, so that nobody always runs after the same one."""
    return [names[(start + place) % len(names)] for start in range(rounds) for place in range(len(names))]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest and largest of a series, and the series itself: no figure without its noise."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": list(values)}


def ratio_spread(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """The spread of the ratios round by round: what was measured side by side is divided."""
    return spread([one / other for one, other in zip(above, below, strict=True)])


def save(name: str, key: str, figures: dict[str, Any], folder: Path) -> None:
    """Put figures under ``key`` (most often a size) of the result file ``name``; other keys stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {**read(name, folder), key: {"machine": describe(), **figures}}
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


def read(name: str, folder: Path) -> dict[str, Any]:
    """A result file; empty where nothing was measured yet."""
    file = folder / f"{name}.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return results


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def shown(figures: dict[str, Any] | None, digits: int = 2, scale: float = 1.0) -> str:
    """``median (min to max)`` of a spread."""
    if not figures:
        return "not measured"
    median, low, high = (f"{figures[key] / scale:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def parser(description: str | None, *, size: str, rounds: int) -> argparse.ArgumentParser:
    """The options that every script has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", default=size, help=f"a size of loadtests.pairs (default {size})")
    made.add_argument("--rounds", type=int, default=rounds, help=f"default {rounds}")
    made.add_argument("--work", type=Path, default=WORK, help="folder for pairs, merged checkpoints and logs")
    made.add_argument("--keep", action="store_true", help="leave the pair that was made for the next run")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    return made
