"""How a sweep's numbers are shown to people: names, values with intervals, sentences. For the page and ``sweep.md``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from expo_serve.config import format_alpha
from expo_serve.errors import count_of
from expo_serve.sweep.results import AlphaResult, Measured, MeasureInfo, SweepResult

RESAMPLED_LEAST = 0.005
"""Alphas chosen in fewer of the bootstrap samples are left out of lists."""
_LIST_LETTERS = 60
_EFFECTIVE = "effective_alpha"
_LARGEST, _MOST_DECIMALS = 1e7, 8
"""Beyond these a number is shown with an exponent."""


def shown_measures(result: SweepResult) -> dict[str, MeasureInfo]:
    """Return the measures that have a value at some alpha, in the order of ``result.measures``.

    Effective alpha is not among them: it has a place of its own. A name such as ``capability:TASK`` that has no entry
    of its own is described by what stands before the colon.
    """
    found = {name for alpha in result.alphas for name, one in alpha.measures.items() if one.value is not None}
    names = [name for name in result.measures if name in found]
    names += sorted(found - set(names))
    return {name: measure_info(result, name) for name in names if name != _EFFECTIVE}


def measure_info(result: SweepResult, name: str) -> MeasureInfo:
    family, _, part = name.partition(":")
    own = result.measures.get(name)
    if own or family not in result.measures:
        return own or MeasureInfo(label=name, unit="", better="", formula="")
    info = result.measures[family]
    return info.model_copy(update={"label": f"{info.label}: {part}"})


def alphas_at(result: SweepResult, alpha: float | None) -> AlphaResult | None:
    """Return what was found at an alpha; None where it is None or was not swept."""
    return next((one for one in result.alphas if one.alpha == alpha), None)


def titled(info: MeasureInfo) -> str:
    """Return a measure's label with its unit; a share is shown in percent, which the numbers say themselves."""
    return f"{info.label} ({info.unit})" if info.unit and info.unit != "share" else info.label


def better(info: MeasureInfo) -> str:
    """Return which way is better, in words; empty where neither is."""
    return f"{info.better} is better" if info.better else ""


def value_text(measured: Measured, unit: str) -> str:
    """Return a value with as many digits as its interval supports: two of the interval's half width, else four.

    Args:
        measured: the value; without one the text is empty.
        unit: ``share`` is shown in percent.
    """
    return _text(measured.value, measured, unit)


def interval_text(measured: Measured, unit: str) -> str:
    """Return the 95% interval, ``0.47 to 0.58``; empty where there is none."""
    low, high = _text(measured.low, measured, unit), _text(measured.high, measured, unit)
    return f"{low} to {high}" if low and high else ""


def number_text(value: float | None, unit: str = "") -> str:
    """Return a number that has no interval, with four digits; empty for None."""
    return value_text(Measured(value=value), unit)


def alpha_text(alpha: float | None) -> str:
    """Return an alpha in its canonical form; a dash for None."""
    return "-" if alpha is None else format_alpha(alpha)


def _text(number: float | None, measured: Measured, unit: str) -> str:
    if number is None or not math.isfinite(number):
        return ""
    half = _half_width(measured)
    if unit == "share":
        return f"{_rounded(100 * number, half and 100 * half)}%"
    return _rounded(number, half)


def _half_width(measured: Measured) -> float | None:
    """Return half the width of the interval; None where there is none, or it is a point."""
    if measured.low is None or measured.high is None:
        return None
    half = (measured.high - measured.low) / 2
    return half if half > 0 and math.isfinite(half) else None


def _rounded(number: float, half: float | None) -> str:
    """Round so that two digits of ``half`` would be seen, or to four digits."""
    precision = half or abs(number) / 100
    decimals = max(0, 1 - math.floor(math.log10(precision))) if precision > 0 else 0
    if abs(number) >= _LARGEST or decimals > _MOST_DECIMALS:
        return f"{number:.3g}"
    text = f"{number:.{decimals}f}"
    if half is None and "." in text:
        text = text.rstrip("0").rstrip(".")
    return text.lstrip("-") if float(text) == 0 else text


def headline(result: SweepResult) -> str:
    """Return the recommendation in a few words."""
    if result.status == "interrupted":
        return "Interrupted: no recommendation yet"
    if result.recommendation is None:
        return "No recommendation"
    return f"alpha {alpha_text(result.recommendation)}"


@dataclass(frozen=True)
class Fact:
    """A number that the recommendation rests on."""

    term: str
    text: str
    note: str = ""


def facts(result: SweepResult) -> list[Fact]:
    """Return what the recommendation rests on."""
    return [*_effect_facts(result), *_stability_facts(result), *_place_facts(result), _feasible_fact(result)]


def _effect_facts(result: SweepResult) -> Iterable[Fact]:
    effect = result.decision.effect
    if effect is None:
        return
    info = measure_info(result, effect.measure)
    measured = Measured(value=effect.difference, low=effect.low, high=effect.high)
    yield Fact(
        f"{info.label}, alpha {alpha_text(effect.alpha)} against alpha 0",
        f"{'+' if effect.difference > 0 else ''}{value_text(measured, info.unit)}",
        f"95% interval {interval_text(measured, info.unit)}, on {count_of(effect.n, 'prompt')} that the choice has not "
        "seen",
    )


def _stability_facts(result: SweepResult) -> Iterable[Fact]:
    decision = result.decision
    if decision.alpha_low is None or decision.alpha_high is None:
        return
    low, high = alpha_text(decision.alpha_low), alpha_text(decision.alpha_high)
    text = f"alpha {low}" if low == high else f"alpha {low} to {high}"
    yield Fact("Where the choice falls", text, "in 95% of the resamples of the prompts")


def _place_facts(result: SweepResult) -> Iterable[Fact]:
    chosen = alphas_at(result, result.recommendation)
    if chosen is None or not chosen.alpha:
        return
    yield Fact("Effective alpha", number_text(chosen.effective_alpha) or "none", "what is left of it after rounding")
    if chosen.kl is not None:
        yield Fact("KL from alpha 0", number_text(chosen.kl), "nats/token")


def _feasible_fact(result: SweepResult) -> Fact:
    refused = [alpha_text(row.alpha) for row in result.alphas if not row.feasible]
    note = f"refused: {shorten(', '.join(refused), _LIST_LETTERS, placeholder=', ...')}" if refused else ""
    return Fact("Feasible alphas", f"{len(result.alphas) - len(refused)} of {len(result.alphas)}", note)


def reason(result: SweepResult) -> str:
    """Return why this is the recommendation."""
    return f"{'So far: ' if result.status == 'interrupted' else ''}{result.decision.reason}"


def chosen_shares(result: SweepResult) -> list[tuple[str, float]]:
    """Return how often each alpha is chosen over bootstrap samples, by rising alpha, without the rare ones."""
    shares = result.decision.chosen_share
    return [(alpha, shares[alpha]) for alpha in sorted(shares, key=float) if shares[alpha] >= RESAMPLED_LEAST]


def status_of(alpha: AlphaResult, result: SweepResult) -> str:
    """Return ``recommended``, ``feasible`` or ``refused``."""
    if not alpha.feasible:
        return "refused"
    return "recommended" if alpha.alpha == result.recommendation else "feasible"


def names_of_sources(result: SweepResult) -> str:
    """Return what was extrapolated, ``base and aligned``, by name."""
    return " and ".join(source.name for source in result.sources.values())


def setting_text(value: Any) -> str:
    """Return a setting's value as it is, or as JSON."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
