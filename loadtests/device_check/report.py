"""What is shown of an outcome, and the file in which all of them are kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadtests.device_check.outcome import Outcome

FILE = "device_check"


def shown(outcome: Outcome) -> str:
    """The lines of one outcome: its status and reason, then its figures."""
    head = f"{outcome.case}: {outcome.status} ({outcome.seconds:.0f} s)"
    return "\n".join([f"{head}{f' - {outcome.reason}' if outcome.reason else ''}", *_figures(outcome.figures)])


def _figures(figures: dict[str, Any]) -> Iterator[str]:
    for name, value in figures.items():
        if name == "wrong" or value in ({}, []):
            continue
        if isinstance(value, dict):
            yield f"  {name}:"
            yield from (f"    {key}: {_short(one)}" for key, one in value.items())
        else:
            yield f"  {name}: {_short(value)}"


def _short(value: Any) -> str:
    """A spread as ``median (min to max)``, all else as JSON."""
    if isinstance(value, dict) and {"median", "min", "max"} <= value.keys():
        median, low, high = (f"{value[key]:.3g}" for key in ("median", "min", "max"))
        return f"{median} ({low} to {high})"
    return value if isinstance(value, str) else json.dumps(value)


def keep(outcomes: Sequence[Outcome], key: str, folder: Path, facts: dict[str, Any]) -> None:
    """Write what there is by now: a run that is cut short has kept what came before."""
    from loadtests.results import save  # it imports torch

    save(FILE, key, {**facts, "cases": {one.case: asdict(one) for one in outcomes}}, folder)


def summed(outcomes: Sequence[Outcome]) -> str:
    """One line: how many of each status."""
    counts = Counter(one.status for one in outcomes)
    return ", ".join(f"{number} {status}" for status, number in counts.most_common()) or "no case"
