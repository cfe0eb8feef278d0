"""Draws what a sweep measured: each measure over alpha, and reward against KL. As PNG files, and for the page.

matplotlib draws both: the page holds the same figures as SVG, which needs no script, no network and no 4 MB of library
in each report, can take the colours of the page's theme, and stays sharp at every width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from textwrap import shorten
from typing import Any

from expo_serve.errors import UsageError
from expo_serve.sweep.results import AlphaResult, Measured, MeasureInfo, SweepResult
from expo_serve.sweep.shown import alpha_text, better, number_text, shown_measures, status_of, titled

PANELS = "sweep.png"
REWARD_KL = "reward-kl"
POINT = "point-"
"""Begins the id of an alpha's mark in a figure; its index in ``result.alphas`` follows."""
_WIDE_GRID = 10
_WIDE_VALUES = 20
"""From these ratios of the largest to the median alpha or value on, the axis is logarithmic: else half of the marks
would lie on one place."""
_LABEL_ROOM = 0.13
_MARK_ROOM = 0.1
"""Least distance of two labels of the axis, and of two marks with labels, as a share of the axis' length."""
_COLUMNS = 3
_PANEL_INCHES = (4.4, 3.3)
_DPI = 120
_TITLE_LETTERS = 56
_TITLE_POINTS = 32
"""Above the axes, where the effective alphas stand below it."""


@dataclass(frozen=True)
class Palette:
    """The colours of a figure, as matplotlib takes them."""

    ink: str = "#1b2530"
    muted: str = "#5b6672"
    grid: str = "#dfe3e8"
    paper: str = "#ffffff"
    feasible: str = "#1f5fbf"
    refused: str = "#b3261e"
    recommended: str = "#0f7a43"


@dataclass(frozen=True)
class Chart:
    """One figure."""

    name: str
    """The measure's, or ``reward-kl``."""
    title: str
    note: str
    """Which way is better, or what the figure shows; may be empty."""
    draw: Callable[[Any, Palette], None]
    """Draws onto matplotlib's axes."""


def check_plots() -> None:
    """Check that what the report and the plots are made with is installed; imports nothing.

    Raises:
        UsageError: it is not.
    """
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise UsageError(f"a sweep's report needs {' and '.join(missing)}: pip install 'expo-serve[sweep]'")


def write_plots(result: SweepResult, out: Path) -> list[Path]:
    """Draw the PNG files of a sweep; existing ones are replaced.

    Args:
        result: what was found.
        out: the folder; ``sweep.png`` has a panel for each measure over alpha, and ``reward-kl.png``, which there is
            with a reward alone, shows reward against the square root of KL.

    Returns:
        The files that were written.

    Raises:
        OSError: one cannot be written.
    """
    written = [_write(measure_charts(result), result, out / PANELS)]
    against_kl = reward_kl_chart(result)
    if against_kl:
        written.append(_write([against_kl], result, out / f"{REWARD_KL}.png"))
    return written


def measure_charts(result: SweepResult) -> list[Chart]:
    """Return a figure for each measure over alpha, effective alpha the last."""
    charts = [
        Chart(name, titled(info), better(info), partial(_draw_measure, result=result, name=name, info=info))
        for name, info in shown_measures(result).items()
    ]
    draw = partial(_draw_effective, result=result)
    return [*charts, Chart("effective_alpha", "Effective alpha", "dotted: as much as alpha", draw)]


def reward_kl_chart(result: SweepResult) -> Chart | None:
    """Return the figure of reward against the square root of KL (Gao et al. 2022, arXiv 2210.10760).

    Gold rewards follow ``d (a - b d)`` in ``d = sqrt(KL)``: they rise, bend and fall. None where fewer than two alphas
    have both.
    """
    rows = [row for row in result.alphas if _reward(row).value is not None and row.kl is not None]
    if len(rows) < 2:
        return None
    info = shown_measures(result).get("reward")
    title = f"{titled(info) if info else 'Reward'} against KL from alpha 0"
    return Chart(REWARD_KL, title, "labels: alpha", partial(_draw_reward_kl, result=result, info=info))


def _write(charts: Sequence[Chart], result: SweepResult, file: Path) -> Path:
    columns = min(_COLUMNS, len(charts))
    rows = math.ceil(len(charts) / columns)
    width, height = _PANEL_INCHES if len(charts) > 1 else (6.4, 4.4)
    figures: Any = import_module("matplotlib.figure")
    figure = figures.Figure(figsize=(columns * width, rows * height + 0.4), layout="constrained")
    palette = Palette()
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes, chart in zip(grid, charts, strict=False):
        chart.draw(axes, palette)
        axes.set_title(_title(chart), fontsize=10, pad=8 if chart.name == REWARD_KL else _TITLE_POINTS)
    for axes in grid[len(charts) :]:
        axes.remove()
    figure.legend(handles=_legend(result, palette), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(file, dpi=_DPI)
    return file


def _legend(result: SweepResult, palette: Palette) -> list[Any]:
    lines: Any = import_module("matplotlib.lines")
    kinds = [kind for kind in ("recommended", "feasible", "refused") if kind in _statuses(result)]
    marks = [lines.Line2D([], [], label=kind, **_mark(kind, palette)) for kind in kinds]
    return [*marks, lines.Line2D([], [], color=palette.feasible, linewidth=1.5, label="95% interval")]


def _statuses(result: SweepResult) -> set[str]:
    return {status_of(row, result) for row in result.alphas}


def _mark(kind: str, palette: Palette) -> dict[str, Any]:
    """Return how an alpha is marked: form and fill differ, not only the colour."""
    colour = {"refused": palette.refused, "recommended": palette.recommended}.get(kind, palette.feasible)
    return {
        "color": colour,
        "marker": "D" if kind == "recommended" else "o",
        "markersize": 7 if kind == "recommended" else 5.5,
        "markerfacecolor": palette.paper if kind == "refused" else colour,
        "markeredgewidth": 1.5,
        "linestyle": "none",
    }


def _draw_measure(axes: Any, palette: Palette, *, result: SweepResult, name: str, info: MeasureInfo) -> None:
    found = [(index, row, row.measures[name]) for index, row in enumerate(result.alphas) if name in row.measures]
    known = [(index, row, one) for index, row, one in found if one.value is not None and math.isfinite(one.value)]
    _prepare(axes, palette)
    _scale_alphas(axes, result, palette)
    _scale_values(axes, [one for _, _, one in known], info)
    zero = next((one.value for _, row, one in known if row.alpha == 0), None)
    if zero is not None:
        axes.axhline(zero, color=palette.muted, linestyle=":", linewidth=1)
    axes.plot([row.alpha for _, row, _ in known], [one.value for _, _, one in known], color=palette.muted, linewidth=1)
    for index, row, one in known:
        _draw_point(axes, palette, status_of(row, result), index, row.alpha, one)


def _draw_effective(axes: Any, palette: Palette, *, result: SweepResult) -> None:
    _prepare(axes, palette)
    _scale_alphas(axes, result, palette)
    alphas = [row.alpha for row in result.alphas]
    axes.plot(alphas, alphas, color=palette.muted, linestyle=":", linewidth=1)
    known = [(index, row) for index, row in enumerate(result.alphas) if row.effective_alpha is not None]
    axes.plot([row.alpha for _, row in known], [row.effective_alpha for _, row in known], color=palette.muted, lw=1)
    for index, row in known:
        measured = Measured(value=row.effective_alpha)
        _draw_point(axes, palette, status_of(row, result), index, row.alpha, measured)


def _draw_reward_kl(axes: Any, palette: Palette, *, result: SweepResult, info: MeasureInfo | None) -> None:
    _prepare(axes, palette)
    if info:
        _scale_values(axes, [], info)
    places = [
        (index, row, math.sqrt(max(0.0, row.kl)), _reward(row))
        for index, row in enumerate(result.alphas)
        if row.kl is not None and _reward(row).value is not None
    ]
    axes.plot([x for _, _, x, _ in places], [one.value for *_, one in places], color=palette.muted, linewidth=1)
    for index, row, x, one in places:
        _draw_point(axes, palette, status_of(row, result), index, x, one)
    shown = [row for _, row, _, _ in places]
    for index in _spread([x for _, _, x, _ in places], shown, result.recommendation, _MARK_ROOM):
        _label_mark(axes, palette, [(x, one.value or 0.0) for _, _, x, one in places], index, shown[index].alpha)
    axes.set_xlabel("square root of KL, nats/token", color=palette.muted)


def _label_mark(axes: Any, palette: Palette, places: Sequence[tuple[float, float]], index: int, alpha: float) -> None:
    """Write an alpha beside its mark, on the side that the line to the next one leaves free."""
    rises = index + 1 < len(places) and places[index + 1][1] > places[index][1]
    beside = {"xytext": (-6, 5), "ha": "right"} if rises else {"xytext": (6, 5), "ha": "left"}
    axes.annotate(alpha_text(alpha), places[index], textcoords="offset points", fontsize=9, color=palette.ink, **beside)


def _reward(row: AlphaResult) -> Measured:
    """Return the reward with its interval, or the bare one where the measure is missing."""
    return row.measures.get("reward") or Measured(value=row.reward)


def _draw_point(axes: Any, palette: Palette, kind: str, index: int, x: float, one: Measured) -> None:
    mark = _mark(kind, palette)
    if one.low is not None and one.high is not None and math.isfinite(one.high - one.low):
        axes.plot([x, x], [one.low, one.high], color=mark["color"], linewidth=1.5)
    axes.plot([x], [one.value], gid=f"{POINT}{index}", zorder=3, **mark)


def _prepare(axes: Any, palette: Palette) -> None:
    axes.set_facecolor("none")
    axes.grid(color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=palette.muted, labelsize=9, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(palette.muted)
    axes.margins(x=0.06, y=0.12)


def _scale_alphas(axes: Any, result: SweepResult, palette: Palette) -> None:
    """Label the axis with alphas that were swept, and above it with what of each is in the weights."""
    sizes = [abs(row.alpha) for row in result.alphas if row.alpha]
    if sizes and max(sizes) >= _WIDE_GRID * median(sizes):
        axes.set_xscale("symlog", linthresh=min(sizes))
    alphas = [row.alpha for row in result.alphas]
    axes.update_datalim([(min(alphas), 0), (max(alphas), 0)], updatey=False)  # every panel is as wide
    places = [float(axes.transScale.transform((alpha, 1))[0]) for alpha in alphas]
    rows = [result.alphas[index] for index in _spread(places, result.alphas, result.recommendation, _LABEL_ROOM)]
    ticks = [row.alpha for row in rows]
    axes.set_xticks(ticks, [alpha_text(alpha) for alpha in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("alpha", color=palette.muted)
    above = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "ha": "center", "fontsize": 9}
    for row in rows:
        axes.annotate(_effective_text(row), (row.alpha, 1), (0, 4), color=palette.muted, **above)
    above["xycoords"] = "axes fraction"
    axes.annotate("effective alpha", (0.5, 1), (0, 17), color=palette.muted, **above)


def _effective_text(row: AlphaResult) -> str:
    effective = row.effective_alpha
    if effective is None:
        return "-"
    return f"{effective:.2g}" if abs(effective) < 100 else f"{effective:.0f}"


def _spread(places: Sequence[float], rows: Sequence[AlphaResult], recommended: float | None, room: float) -> list[int]:
    """Choose whose labels have room beside each other, by index: first the recommended alpha, 0 and the ends."""
    if not places:
        return []
    length = (max(places) - min(places)) or 1.0
    first = [index for index, row in enumerate(rows) if row.alpha in (0, recommended)]
    taken: list[int] = []
    for index in [*first, len(places) - 1, *range(len(places))]:
        if all(abs(places[index] - places[other]) >= room * length for other in taken):
            taken.append(index)
    return sorted(taken)


def _scale_values(axes: Any, found: Sequence[Measured], info: MeasureInfo) -> None:
    """Percent for shares; logarithmic where values differ by orders of magnitude, as perplexity does on collapse."""
    tickers: Any = import_module("matplotlib.ticker")
    values = [one.value for one in found if one.value is not None]
    above = [value for value in values if value > 0]
    if info.unit == "share":
        axes.yaxis.set_major_formatter(tickers.PercentFormatter(1.0))
    elif above and min(values) >= 0 and max(values) >= _WIDE_VALUES * median(values) > 0:
        axes.set_yscale(**({"value": "log"} if above == values else {"value": "symlog", "linthresh": min(above)}))
    else:
        axes.yaxis.set_major_formatter(tickers.FuncFormatter(lambda value, _: number_text(value)))


def _title(chart: Chart) -> str:
    text = shorten(f"{chart.title}; {chart.note}" if chart.note else chart.title, _TITLE_LETTERS, placeholder=" ...")
    return text.replace("$", r"\$")  # matplotlib reads formulas between them
