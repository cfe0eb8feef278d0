"""Writes ``report.html``: one file that shows a sweep, without network, for any browser since 2024.

Everything but the answers is there without scripts. Figures are matplotlib's, as SVG (see :mod:`.plots` for why), and
what users and models wrote reaches the page as text alone: escaped by Jinja, or as JSON that a script puts into text
nodes. A policy in the page (CSP) lets no other script run, and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from expo_serve.config import format_alpha
from expo_serve.errors import count_of
from expo_serve.sweep import shown
from expo_serve.sweep.observations import Answer
from expo_serve.sweep.page_data import answers_by_alpha, page_data
from expo_serve.sweep.plots import REWARD_KL, Chart, measure_charts, reward_kl_chart
from expo_serve.sweep.results import AlphaResult, Measured, SweepResult
from expo_serve.sweep.svg import chart_svg

_ASSETS = files("expo_serve.sweep") / "assets"
_SCRIPTS = ("page.js", "charts.js", "table.js", "compare.js", "answers.js")
_SECTIONS = {
    "recommendation": "Recommendation",
    "measures": "Measures",
    "table": "Numbers",
    "answers": "Answers",
    "deploy": "Deploy",
    "details": "Details",
}
_DEPLOY = {"command": "Serve it with expo-serve", "values": "Values of the Helm chart"}


def write_page(result: SweepResult, answers: Iterable[Answer], out: Path) -> None:
    """Write the report of a sweep; an existing file is replaced.

    Args:
        result: what was found.
        answers: to ``--prompts``, at any of its alphas; those that are missing are shown so.
        out: the HTML file.

    Raises:
        OSError: it cannot be written.
    """
    out.write_text(render_page(result, answers), encoding="utf-8")


def render_page(result: SweepResult, answers: Iterable[Answer]) -> str:
    """Return the report as HTML; arguments as for :func:`write_page`."""
    jinja: Any = import_module("jinja2")
    markup: Any = import_module("markupsafe").Markup
    environment = jinja.Environment(autoescape=True, undefined=jinja.StrictUndefined, trim_blocks=True)
    script = "".join(_asset(name) for name in _SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return str(
        environment.from_string(_asset("page.html.jinja")).render(
            **_head(result),
            **_tables(result),
            charts=[_figure(chart, result, markup) for chart in _charts(result)],
            style=markup(_asset("page.css")),
            script=markup(script),
            script_hash=digest,
            data=markup(_inert(page_data(result))),
            texts=[markup(_inert(part)) for part in answers_by_alpha(result, answers)],
        )
    )


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _inert(data: Any) -> str:
    """Return JSON that cannot end the script element that it is in, nor open a comment there."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _head(result: SweepResult) -> dict[str, Any]:
    decision = result.decision
    return {
        "result": result,
        "kind": "none" if result.recommendation is None else decision.kind,
        "headline": shown.headline(result),
        "reason": shown.reason(result),
        "sources": shown.names_of_sources(result),
        "sections": _SECTIONS.items(),
        "facts": shown.facts(result),
        "shares": shown.chosen_shares(result),
        "remarks": [("What the data cannot show", decision.remarks), ("Warnings", result.warnings)],
        "deploy": [(name, title, result.deploy[name]) for name, title in _DEPLOY.items() if name in result.deploy],
    }


@dataclass(frozen=True)
class _Cell:
    """A cell of the table: what is sorted by, what is shown, and its interval."""

    name: str
    value: float | str | None
    text: str
    interval: str = ""


def _tables(result: SweepResult) -> dict[str, Any]:
    measures = shown.shown_measures(result)
    columns = [("alpha", "alpha", ""), ("status", "Status", ""), ("effective_alpha", "Effective alpha", "")]
    columns += [(name, shown.titled(info), shown.better(info)) for name, info in measures.items()]
    columns.append(("failures", "Failures", ""))
    return {
        "columns": [dict(zip(("name", "label", "note"), column, strict=True)) for column in columns],
        "rows": [
            {
                "alpha": format_alpha(row.alpha),
                "status": shown.status_of(row, result),
                "cells": list(_cells(row, result)),
            }
            for row in result.alphas
        ],
        "refused": [(format_alpha(row.alpha), row.infeasible_because) for row in result.alphas if not row.feasible],
        "definitions": [
            {"title": shown.titled(info), "formula": info.formula, "better": shown.better(info)}
            for info in result.measures.values()
        ],
        "details": list(_details(result)),
    }


def _cells(row: AlphaResult, result: SweepResult) -> Iterator[_Cell]:
    status = shown.status_of(row, result)
    yield _Cell("status", status, status)
    yield _Cell("effective_alpha", row.effective_alpha, shown.number_text(row.effective_alpha))
    for name, info in shown.shown_measures(result).items():
        one = row.measures.get(name, Measured(value=None))
        value = one.value if one.value is not None and math.isfinite(one.value) else None
        yield _Cell(name, value, shown.value_text(one, info.unit), shown.interval_text(one, info.unit))
    yield _Cell("failures", row.failures, str(row.failures))


def _charts(result: SweepResult) -> list[Chart]:
    against_kl = reward_kl_chart(result)
    return [*([against_kl] if against_kl else []), *measure_charts(result)]


def _figure(chart: Chart, result: SweepResult, markup: Any) -> dict[str, Any]:
    tips = {index: _tip(chart.name, row, result) for index, row in enumerate(result.alphas)}
    return {"name": chart.name, "title": chart.title, "note": chart.note, "svg": markup(chart_svg(chart, tips))}


def _tip(name: str, row: AlphaResult, result: SweepResult) -> str:
    """Return what a figure says of an alpha, in lines."""
    effective = shown.number_text(row.effective_alpha) or "none"
    lines = [f"alpha {format_alpha(row.alpha)}, effective {effective}, {shown.status_of(row, result)}"]
    if name == REWARD_KL:
        lines += [_measured_line("reward", row, result), f"KL: {shown.number_text(row.kl)} nats/token"]
    elif name != "effective_alpha":
        lines.append(_measured_line(name, row, result))
    return "\n".join(line for line in lines if line)


def _measured_line(name: str, row: AlphaResult, result: SweepResult) -> str:
    one, info = row.measures.get(name), shown.shown_measures(result).get(name)
    if one is None or info is None:
        return ""
    interval = shown.interval_text(one, info.unit)
    text = f"{info.label}: {shown.value_text(one, info.unit)}"
    return f"{text} ({interval}), n = {one.n}" if interval else f"{text}, n = {one.n}"


def _details(result: SweepResult) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield headings with their terms and texts."""
    yield (
        "Sources",
        [
            (operand, f"{source.name}\nrevision {source.revision or 'none'}\nfingerprint {source.fingerprint}")
            for operand, source in result.sources.items()
        ],
    )
    yield "Settings", [(key, shown.setting_text(value)) for key, value in result.settings.items()]
    yield "Versions", [("expo-serve", result.version), *result.versions.items()]
    yield "Time and deployment identities", list(_times(result))


def _times(result: SweepResult) -> Iterator[tuple[str, str]]:
    timing = result.timing
    starts = count_of(timing.engine_starts, "engine start")
    yield "Everything", f"{_seconds(timing.total_seconds)}, {starts} in {_seconds(timing.start_seconds)}"
    for row in result.alphas:
        generated = f", answers {_seconds(row.generate_seconds)}" if row.generate_seconds is not None else ""
        yield f"alpha {format_alpha(row.alpha)}", f"load {_seconds(row.load_seconds)}{generated}, {row.deployment_id}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.4g} s" if seconds < 1000 else f"{seconds:.0f} s"
