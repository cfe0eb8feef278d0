"""Writes ``sweep.md``: the recommendation, the numbers and how to deploy, as Markdown for a repository or a ticket."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from expo_serve.sweep import shown
from expo_serve.sweep.plots import PANELS, REWARD_KL, reward_kl_chart
from expo_serve.sweep.results import AlphaResult, Measured, SweepResult

_SPECIAL = re.compile(r"[\\`*<&\[\]|~$]|(?<!\w)_|_(?!\w)")
"""What would be read as markup within a line; an underscore within a word is none."""
_LEADING = re.compile(r"^(?=[#>+-])")
"""Where a line would be read as a heading, a quotation or another list."""
_BACKSLASH = r"\\"
_FENCED = {"command": "sh", "values": "yaml"}


def write_markdown(result: SweepResult, out: Path) -> None:
    """Write the summary of a sweep; an existing file is replaced.

    Args:
        result: what was found.
        out: the Markdown file; beside it are the plots, which it shows.

    Raises:
        OSError: it cannot be written.
    """
    out.write_text("\n".join(_lines(result)) + "\n", encoding="utf-8")


def _lines(result: SweepResult) -> Iterator[str]:
    yield f"# Which alpha? {_inline(shown.names_of_sources(result))}"
    yield ""
    yield f"**{shown.headline(result)}.** {_inline(shown.reason(result))}"
    yield ""
    yield from _facts(result)
    yield from _section("What the data cannot show", _items(result.decision.remarks))
    yield from _section("Warnings", _items(result.warnings))
    yield from _section("Numbers", _table(result))
    yield from _section("Refused alphas", _items(_refusals(result)))
    yield from _section("Plots", _plots(result))
    yield from _section("Deploy", _deploy(result))
    yield from _section("Measures", _items(_definitions(result)))
    yield from _section("How it was measured", _items(_details(result)))


def _section(heading: str, lines: Iterator[str]) -> Iterator[str]:
    """Yield a heading and what is under it; nothing if there is nothing."""
    content = "\n".join(lines).rstrip()
    if content:
        yield from ("", f"## {heading}", "", content)


def _items(texts: Sequence[str] | Iterator[str]) -> Iterator[str]:
    yield from (f"- {_LEADING.sub(_BACKSLASH, _inline(text))}" for text in texts)


def _facts(result: SweepResult) -> Iterator[str]:
    for fact in shown.facts(result):
        note = f" ({_inline(fact.note)})" if fact.note else ""
        yield f"- {_inline(fact.term)}: **{_inline(fact.text)}**{note}"
    if shares := shown.chosen_shares(result):
        yield f"- Chosen over resampled prompts: {', '.join(f'alpha {alpha} {share:.0%}' for alpha, share in shares)}"


def _table(result: SweepResult) -> Iterator[str]:
    measures = shown.shown_measures(result)
    yield _row(["alpha", "effective alpha", "", *(_inline(shown.titled(info)) for info in measures.values())])
    yield _row(["--:", "--:", "---", *["--:"] * len(measures)])
    for row in result.alphas:
        cells = [_cell(row.measures.get(name), info.unit) for name, info in measures.items()]
        yield _row([*_first_cells(row, result), *cells])
    yield ""
    yield "In brackets: 95% intervals."


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _first_cells(row: AlphaResult, result: SweepResult) -> list[str]:
    alpha, status = shown.alpha_text(row.alpha), shown.status_of(row, result)
    is_chosen = status == "recommended"
    effective = shown.number_text(row.effective_alpha) or "-"
    return [f"**{alpha}**" if is_chosen else alpha, effective, f"**{status}**" if is_chosen else status]


def _cell(one: Measured | None, unit: str) -> str:
    if one is None:
        return "-"
    interval = shown.interval_text(one, unit)
    value = shown.value_text(one, unit) or "-"
    return f"{value} ({interval})" if interval else value


def _refusals(result: SweepResult) -> Iterator[str]:
    for row in result.alphas:
        if not row.feasible:
            yield f"alpha {shown.alpha_text(row.alpha)}: {'; '.join(row.infeasible_because)}"


def _plots(result: SweepResult) -> Iterator[str]:
    yield f"![Measures over alpha]({PANELS})"
    if chart := reward_kl_chart(result):
        yield from ("", f"![{_inline(chart.title)}]({REWARD_KL}.png)")


def _deploy(result: SweepResult) -> Iterator[str]:
    for name, language in _FENCED.items():
        if name in result.deploy:
            yield from (*_fenced(result.deploy[name], language), "")


def _fenced(text: str, language: str) -> Iterator[str]:
    """Yield a block of code, between fences longer than any within it."""
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    yield from (f"{fence}{language}", *text.rstrip("\n").splitlines(), fence)


def _definitions(result: SweepResult) -> Iterator[str]:
    for info in result.measures.values():
        way = f"; {shown.better(info)}" if info.better else ""
        yield f"{shown.titled(info)}: {info.formula}{way}"


def _details(result: SweepResult) -> Iterator[str]:
    for operand, source in result.sources.items():
        yield f"{operand}: {source.name}, revision {source.revision or 'none'}, fingerprint {source.fingerprint}"
    yield from (f"{key}: {shown.setting_text(value)}" for key, value in result.settings.items())
    versions = {"expo-serve": result.version, **result.versions}
    yield f"versions: {', '.join(f'{name} {version}' for name, version in versions.items())}"


def _inline(text: str) -> str:
    """Return text as one line that Markdown shows as it is."""
    return _SPECIAL.sub(lambda found: f"\\{found.group()}", " ".join(text.split()))
