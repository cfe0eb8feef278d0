"""The plots of a sweep: what is drawn is what was measured, and can be read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from expo_serve.errors import UsageError
from expo_serve.sweep import plots
from expo_serve.sweep.plots import POINT, Chart, Palette, check_plots, measure_charts, reward_kl_chart, write_plots
from expo_serve.sweep.results import Measured, SweepResult
from tests.sweep.results import nasty_result, sweep_result

_FEW = (0.0, 0.5, 1.0)


def draw(chart: Chart | None) -> Axes:
    """A figure's axes, drawn."""
    assert chart is not None
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots()
    chart.draw(axes, Palette())
    figure.canvas.draw()
    return axes


def chart_of(result: SweepResult, name: str) -> Chart:
    """The figure of a measure."""
    return next(chart for chart in measure_charts(result) if chart.name == name)


def points(axes: Axes) -> dict[int, tuple[float, float]]:
    """Where the marks are, by index of their alpha."""
    marks = [line for line in axes.lines if str(line.get_gid()).startswith(POINT)]
    return {int(str(line.get_gid()).removeprefix(POINT)): _only(line.get_xydata()) for line in marks}


def _only(places: Any) -> tuple[float, float]:
    ((x, y),) = places
    return float(x), float(y)


def intervals(axes: Axes) -> list[tuple[float, float, float]]:
    """Vertical lines of two ends: where, and from where to where."""
    lines: list[Any] = [line.get_xydata() for line in axes.lines if not line.get_gid()]
    ends = [line.tolist() for line in lines if len(line) == 2]
    return [(x, low, high) for (x, low), (other, high) in ends if x == other]


def test_marks_and_intervals_are_the_measures_values() -> None:
    result = sweep_result(_FEW)
    for name in result.alphas[0].measures:
        axes = draw(chart_of(result, name))
        measured = [row.measures[name] for row in result.alphas]
        assert points(axes) == {index: (_FEW[index], one.value) for index, one in enumerate(measured)}
        assert intervals(axes) == [(alpha, one.low, one.high) for alpha, one in zip(_FEW, measured, strict=True)]


def test_effective_alpha_stands_above_its_alpha_and_has_a_figure() -> None:
    result = sweep_result(_FEW)
    above = [(text.xy, text.get_text()) for text in draw(chart_of(result, "length")).texts]  # type: ignore[attr-defined]
    assert above[:3] == [((0.0, 1), "0"), ((0.5, 1), "0.6"), ((1.0, 1), "1.2")]
    assert points(draw(chart_of(result, "effective_alpha"))) == {0: (0, 0), 1: (0.5, 0.6), 2: (1, 1.2)}


def test_reward_is_drawn_over_the_square_root_of_kl() -> None:
    result = sweep_result(_FEW)
    axes = draw(reward_kl_chart(result))
    expected = {index: (math.sqrt(row.kl or 0), row.reward) for index, row in enumerate(result.alphas)}
    assert points(axes) == expected
    assert [text.get_text() for text in axes.texts] == ["0", "0.5", "1"]
    assert "square root" in axes.get_xlabel()


def test_there_is_no_reward_over_kl_without_a_reward_or_with_one_alpha() -> None:
    assert reward_kl_chart(sweep_result(_FEW, with_reward=False)) is None
    assert reward_kl_chart(sweep_result((0.0,))) is None


def test_refused_and_recommended_alphas_differ_in_form_not_only_in_colour() -> None:
    axes = draw(chart_of(sweep_result((0.0, 0.4, 2.0)), "reward"))
    marks = [line for line in axes.lines if line.get_gid()]
    assert [mark.get_marker() for mark in marks] == ["o", "D", "o"]
    assert marks[0].get_markerfacecolor() == marks[0].get_color()
    assert marks[2].get_markerfacecolor() == Palette().paper


def test_missing_values_are_left_out() -> None:
    result, _ = nasty_result()
    assert list(points(draw(chart_of(result, "reward")))) == [0, 2]
    assert list(points(draw(chart_of(result, "perplexity")))) == [0]
    assert list(points(draw(chart_of(result, "effective_alpha")))) == [1, 2]


@pytest.mark.parametrize(
    "alphas",
    [
        [step / 20 for step in range(40)],
        [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2],
        [0, *(0.1 * 2**step for step in range(11))],
        [-1, -0.5, 0, 0.4, 1000],
        [0],
    ],
)
def test_labels_of_alphas_do_not_touch(alphas: list[float]) -> None:
    result = sweep_result(alphas)
    axes = draw(chart_of(result, "length"))
    for labels in (list(_labels_below(axes)), list(_labels_above(axes))):
        boxes = [label.get_window_extent() for label in labels]
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    shown = [label.get_text() for label in _labels_below(axes)]
    assert "0" in shown
    assert ("0.4" in shown) == (0.4 in alphas)


def _labels_below(axes: Axes) -> Iterator[Any]:
    yield from (label for label in axes.get_xticklabels() if label.get_text())


def _labels_above(axes: Axes) -> Iterator[Any]:
    yield from axes.texts


def test_axes_are_logarithmic_where_half_of_the_marks_would_lie_on_one_place() -> None:
    far = sweep_result((0.0, 0.1, 0.2, 0.4, 0.8, 100.0))
    near = sweep_result()
    assert draw(chart_of(far, "kl")).get_xscale() == "symlog"
    assert draw(chart_of(far, "kl")).get_yscale() == "symlog"
    assert draw(chart_of(far, "perplexity")).get_yscale() == "log"
    for name in ("kl", "perplexity", "reward", "unfinished"):
        axes = draw(chart_of(near, name))
        assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")


def test_shares_are_in_percent() -> None:
    labels = [label.get_text() for label in draw(chart_of(sweep_result(_FEW), "win_rate")).get_yticklabels()]
    assert labels
    assert all(label.endswith("%") for label in labels)


def test_files_have_a_panel_for_each_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[list[str]] = []
    save = Figure.savefig

    def note(figure: Figure, *arguments: Any, **how: Any) -> None:
        saved.append([axes.get_title() for axes in figure.axes])
        save(figure, *arguments, **how)

    monkeypatch.setattr(Figure, "savefig", note)
    result = sweep_result(_FEW)
    assert write_plots(result, tmp_path) == [tmp_path / "sweep.png", tmp_path / "reward-kl.png"]
    panels, against_kl = saved
    assert len(panels) == len(result.alphas[0].measures) + 1
    assert "Unfinished answers; lower is better" in panels
    assert against_kl == ["Reward against KL from alpha 0; labels: alpha"]
    for name in ("sweep.png", "reward-kl.png"):
        picture = matplotlib.image.imread(tmp_path / name)
        assert min(picture.shape[:2]) > 400
        assert picture.std() > 0.05


@pytest.mark.parametrize("result", [nasty_result()[0], sweep_result((0.0,), status="interrupted")])
def test_every_sweep_can_be_drawn(result: SweepResult, tmp_path: Path) -> None:
    assert all(file.stat().st_size > 10_000 for file in write_plots(result, tmp_path))


def test_measures_without_a_description_are_drawn(tmp_path: Path) -> None:
    result = sweep_result(_FEW)
    rows = [row.model_copy(update={"measures": {"new": Measured(value=1.0)}}) for row in result.alphas]
    charts = measure_charts(result.model_copy(update={"alphas": rows}))
    assert [chart.title for chart in charts] == ["new", "Effective alpha"]


def test_folder_that_cannot_be_written_to_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        write_plots(sweep_result(_FEW), tmp_path / "missing")


def test_missing_packages_are_named_with_the_extra_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    check_plots()
    monkeypatch.setattr(plots, "find_spec", lambda name: None if name == "matplotlib" else ModuleSpec(name, None))
    with pytest.raises(UsageError, match=r"needs matplotlib: pip install 'expo-serve\[sweep\]'"):
        check_plots()
