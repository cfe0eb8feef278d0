"""Prints what a sweep found: a table of the alphas, the recommendation, and where the rest is."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from expo_serve.config import format_alpha
from expo_serve.sweep.results import AlphaResult, Measured, SweepResult

_COLUMNS = {
    "reward": "reward", "reward_lc": "gain", "kl": "KL", "length": "length", "unfinished": "cut", "perplexity": "ppl",
    "capability": "capab.",
}  # fmt: skip
"""Measures that have a column here, if they were measured, and its short title; all of them are in the report."""
_WIDTH = 120
"""Of the output where it is not a terminal."""


def show(result: SweepResult, out: Path) -> None:
    """Print the result on standard output.

    Args:
        result: what was found.
        out: the sweep's folder.
    """
    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else _WIDTH)
    shown = [name for name in _COLUMNS if any(name in one.measures for one in result.alphas)]
    console.print(_table(result.alphas, shown))
    for line in _lines(result, out):
        console.print(line, markup=False, soft_wrap=True)


def _lines(result: SweepResult, out: Path) -> Iterator[str]:
    yield _recommendation(result)
    yield from (f"- {remark}" for remark in result.decision.remarks)
    if "command" in result.deploy:
        yield from ("", result.deploy["command"])
    yield from ("", f"{out}: report.html, sweep.json, sweep.md, answers.jsonl, plots")


def _table(alphas: Sequence[AlphaResult], shown: Sequence[str]) -> Table:
    table = Table("alpha", "effective", *(_COLUMNS[name] for name in shown), "feasible", box=SIMPLE_HEAD)
    for one in alphas:
        effective = "-" if one.effective_alpha is None else f"{one.effective_alpha:.3g}"
        cells = [_cell(one.measures.get(name)) for name in shown]
        table.add_row(format_alpha(one.alpha), effective, *cells, "yes" if one.feasible else "no")
    return table


def _cell(measured: Measured | None) -> str:
    return "-" if measured is None or measured.value is None else f"{measured.value:.3g}"


def _recommendation(result: SweepResult) -> str:
    if result.decision.kind == "none":
        return f"No recommendation: {result.decision.reason}"
    assert result.recommendation is not None
    return f"Recommended: alpha {format_alpha(result.recommendation)}. {result.decision.reason}"
