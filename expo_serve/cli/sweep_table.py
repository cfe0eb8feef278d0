"""Prints what a sweep found: a table of the alphas, the recommendation, and where the rest is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from expo_serve.config import format_alpha
from expo_serve.sweep.results import AlphaResult, Measured, SweepResult

_COLUMNS = (
    "reward", "reward_lc", "win_rate", "kl", "length", "unfinished", "distinct_4", "perplexity", "capability",
    "over_refusal",
)  # fmt: skip
"""Measures that have a column, if they were measured; the others are in the report."""


def show(result: SweepResult, out: Path) -> None:
    """Print the result on standard output.

    Args:
        result: what was found.
        out: the sweep's folder.
    """
    console = Console(soft_wrap=True)
    shown = [name for name in _COLUMNS if any(name in one.measures for one in result.alphas)]
    console.print(_table(result.alphas, shown))
    console.print(_recommendation(result), markup=False, highlight=False)
    for remark in result.decision.remarks:
        console.print(f"- {remark}", markup=False, highlight=False)
    if "command" in result.deploy:
        console.print(f"\n{result.deploy['command']}", markup=False, highlight=False)
    console.print(f"\n{out / 'report.html'}, sweep.json, sweep.md, answers.jsonl", markup=False, highlight=False)


def _table(alphas: Sequence[AlphaResult], shown: Sequence[str]) -> Table:
    table = Table("alpha", "effective", *shown, "feasible")
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
