"""What the script of ``report.html`` shows on demand: answers and their scores, as lists that are small as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from expo_serve.config import format_alpha
from expo_serve.sweep.observations import Answer
from expo_serve.sweep.results import AlphaResult, SweepResult
from expo_serve.sweep.shown import measure_info, status_of


def page_data(result: SweepResult) -> dict[str, Any]:
    """Return alphas, prompts and scores; where a list is over alphas, its order is that of ``result.alphas``.

    A measure's ``scores`` are a list of prompts for each alpha, with None where there is none.
    """
    return {
        "alphas": [format_alpha(row.alpha) for row in result.alphas],
        "notes": [_note(row, result) for row in result.alphas],
        "prompts": result.prompts,
        "measures": _measures(result),
        "left": _index_of_zero(result),
        "right": _index_to_compare(result),
    }


def answers_by_alpha(result: SweepResult, answers: Iterable[Answer]) -> list[dict[str, Any]]:
    """Return for each alpha of the result the ``texts`` by prompt, and which of them were ``cut`` at the limit."""
    places = {row.alpha: index for index, row in enumerate(result.alphas)}
    found: list[dict[str, Any]] = [{"texts": [None] * len(result.prompts), "cut": []} for _ in result.alphas]
    for answer in answers:
        if answer.use != "prompt" or answer.alpha not in places:
            continue
        one = found[places[answer.alpha]]
        one["texts"][answer.prompt] = answer.text
        if answer.finish_reason == "length":
            one["cut"].append(answer.prompt)
    return found


def _note(row: AlphaResult, result: SweepResult) -> str:
    status = status_of(row, result)
    return "" if status == "feasible" else status


def _measures(result: SweepResult) -> list[dict[str, Any]]:
    places = {row.alpha: index for index, row in enumerate(result.alphas)}
    scores: dict[str, list[list[float | None]]] = {}
    for sample in result.samples:
        for name, value in sample.scores.items():
            if sample.alpha in places and math.isfinite(value):
                table = scores.setdefault(name, [[None] * len(result.prompts) for _ in result.alphas])
                table[places[sample.alpha]][sample.prompt] = float(f"{value:.6g}")
    order = {name: index for index, name in enumerate(result.measures)}
    names = sorted(scores, key=lambda name: (order.get(name, len(order)), name))
    return [{"name": name, "scores": scores[name], **_public(result, name)} for name in names]


def _public(result: SweepResult, name: str) -> dict[str, str]:
    info = measure_info(result, name)
    return {"label": info.label, "unit": info.unit, "better": info.better}


def _index_of_zero(result: SweepResult) -> int:
    return next((index for index, row in enumerate(result.alphas) if row.alpha == 0), 0)


def _index_to_compare(result: SweepResult) -> int:
    """Return the alpha beside alpha 0 at first: the recommended one, else the best, else the largest feasible one."""
    wanted = [result.recommendation, result.decision.best, *reversed(result.decision.feasible)]
    places = {row.alpha: index for index, row in enumerate(result.alphas) if row.alpha}
    return next((places[alpha] for alpha in wanted if alpha in places), len(result.alphas) - 1)
