"""The results of a run, as a table to read and as JSON to keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from expo_serve.state.snapshot import without_paths
from loadtests.chaos.faults import CATALOGUE
from loadtests.chaos.run import Result
from loadtests.results import spread, table

VERDICTS = ("kept", "broken", "not possible here", "no effect", "not reached")
_MAX_LINE = 300
"""Characters of a last line that are kept: one of a log that nobody read may have thousands."""


def as_figures(results: Sequence[Result]) -> dict[str, Any]:
    """Return what a result file keeps: counts, what was measured of each kind of fault, and every single fault."""
    names = [name for name in CATALOGUE if any(result.fault.kind == name for result in results)]
    return {
        "faults": len(results),
        "verdicts": _counts(result.verdict for result in results),
        "requests": _counts_of_clients(results),
        "greedy_answers": _greedy(results),
        "kinds": {name: _kind([result for result in results if result.fault.kind == name]) for name in names},
        "all": [_one(result) for result in results],
    }


def _counts(items: Any) -> dict[str, int]:
    return dict(Counter(items).most_common())


def _counts_of_clients(results: Sequence[Result]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for result in results:
        if result.seen:
            total.update({str(outcome): count for outcome, count in result.seen.clients.items()})
    return dict(total.most_common())


def _greedy(results: Sequence[Result]) -> dict[str, int]:
    seen = [result.seen for result in results if result.seen]
    return {"compared": sum(one.compared for one in seen), "wrong": sum(one.wrong for one in seen)}


def _kind(results: Sequence[Result]) -> dict[str, Any]:
    seen = [result.seen for result in results if result.seen]
    recoveries = [one.recovery_seconds for one in seen if one.recovery_seconds is not None]
    ends = [one.end_seconds for one in seen if one.end_seconds is not None]
    return {
        "verdicts": _counts(result.verdict for result in results),
        "recovery_seconds": _spread(recoveries),
        "end_seconds": _spread(ends),
        "exit_codes": sorted({one.code for one in seen if one.code is not None}),
        "requests": _counts_of_clients(results),
        "why": sorted({without_paths(why) for result in results for why in result.why}),
    }


def _spread(values: list[float]) -> dict[str, Any] | None:
    return spread([round(value, 2) for value in values]) if values else None


def _one(result: Result) -> dict[str, Any]:
    return {
        "life": result.life,
        "fault": result.fault.kind,
        "delay_seconds": result.fault.delay,
        "holds_seconds": result.fault.holds,
        "verdict": result.verdict,
        "last_line": without_paths(result.seen.last_line)[:_MAX_LINE] if result.seen else "",
        "files_left": len(result.seen.remains.files) if result.seen and result.seen.remains else 0,
    }


def summary(figures: dict[str, Any]) -> str:
    """Return the table of a run: a line for each kind of fault."""
    rows = []
    for name, kind in figures["kinds"].items():
        verdicts = ", ".join(f"{kind['verdicts'][one]} {one}" for one in VERDICTS if one in kind["verdicts"])
        rows.append((name, verdicts, _shown(kind["recovery_seconds"]), _shown(kind["end_seconds"]), _codes(kind)))
    head = ("fault", "promise", "answers again, s", "ended, s", "exit code")
    counts = ", ".join(f"{count} {outcome}" for outcome, count in figures["requests"].items())
    greedy = figures["greedy_answers"]
    lines = [f"Requests: {counts or 'none'}.", f"Greedy answers: {greedy['wrong']} of {greedy['compared']} are wrong."]
    return "\n".join([table(head, rows), "", *lines, *_reasons(figures)])


def _shown(seconds: dict[str, Any] | None) -> str:
    if seconds is None:
        return ""
    low, high = seconds["min"], seconds["max"]
    return f"{low:.1f}" if low == high else f"{low:.1f} to {high:.1f}"


def _codes(kind: dict[str, Any]) -> str:
    return ", ".join(map(str, kind["exit_codes"]))


def _reasons(figures: dict[str, Any]) -> list[str]:
    return [f"{name}: {why}" for name, kind in figures["kinds"].items() for why in kind["why"]]


def line(result: Result) -> str:
    """Return one result in a line, for whoever watches."""
    seen = result.seen
    parts = [f"life {result.life}: {result.fault.kind}: {result.verdict}"]
    if seen and seen.recovery_seconds is not None:
        parts.append(f"answers after {seen.recovery_seconds:.1f} s")
    if seen and seen.code is not None:
        parts.append(f"exit code {seen.code} after {seen.end_seconds:.1f} s: {seen.last_line[:160]}")
    return "; ".join([*parts, *result.why])
