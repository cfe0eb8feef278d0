"""How numbers are shown: with the digits that their interval supports, and never as another number."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expo_serve.sweep.results import Decision, Measured
from expo_serve.sweep.shown import (
    chosen_shares,
    headline,
    interval_text,
    number_text,
    shown_measures,
    status_of,
    value_text,
)
from tests.sweep.results import sweep_result


@pytest.mark.parametrize(
    ("measured", "unit", "value", "interval"),
    [
        (Measured(value=0.52314, low=0.4701, high=0.5762), "", "0.523", "0.470 to 0.576"),
        (Measured(value=128.4, low=119, high=138), "tokens", "128.4", "119.0 to 138.0"),
        (Measured(value=0.0649, low=0.031, high=0.131), "share", "6.5%", "3.1% to 13.1%"),
        (Measured(value=1.23e-5, low=1.1e-5, high=1.4e-5), "", "0.0000123", "0.0000110 to 0.0000140"),
        (Measured(value=0, low=0, high=0), "nats/token", "0", "0 to 0"),
        (Measured(value=-0.00001, low=-0.5, high=0.5), "", "0.00", "-0.50 to 0.50"),
        (Measured(value=1.0), "share", "100%", ""),
        (Measured(value=0.2173), "", "0.2173", ""),
        (Measured(value=3e9), "", "3e+09", ""),
        (Measured(value=None), "", "", ""),
        (Measured(value=math.inf, low=1, high=math.inf), "", "", ""),
    ],
)
def test_value_and_interval(measured: Measured, unit: str, value: str, interval: str) -> None:
    assert value_text(measured, unit) == value
    assert interval_text(measured, unit) == interval


@given(st.floats(min_value=-1e12, max_value=1e12))
def test_bare_number_is_right_to_four_digits_or_eight_decimals(number: float) -> None:
    assert float(number_text(number)) == pytest.approx(number, rel=6e-3, abs=1e-12)
    if 1e-5 < abs(number) < 1e7:
        assert float(number_text(number)) == pytest.approx(number, rel=6e-4)


@given(st.floats(min_value=-1e6, max_value=1e6), st.floats(min_value=1e-6, max_value=1e6))
def test_value_is_off_by_less_than_a_tenth_of_the_half_interval(value: float, half: float) -> None:
    text = value_text(Measured(value=value, low=value - half, high=value + half), "")
    assert abs(float(text) - value) <= 0.06 * half


def test_effective_alpha_is_no_measure_among_others_and_tasks_take_their_familys_words() -> None:
    result = sweep_result((0.0, 0.5))
    rows = [
        row.model_copy(update={"measures": {**row.measures, "effective_alpha": Measured(value=row.effective_alpha)}})
        for row in result.alphas
    ]
    shown = shown_measures(result.model_copy(update={"alphas": rows}))
    assert "effective_alpha" not in shown
    assert shown["capability:arc_easy"].label == "Capability: arc_easy"
    assert shown["capability:arc_easy"].unit == "share"


def test_rare_choices_are_left_out_and_the_others_are_in_order() -> None:
    decision = Decision(kind="zero", reason="", feasible=[], chosen_share={"10": 0.3, "2": 0.6, "1": 0.001, "0": 0.099})
    assert chosen_shares(sweep_result().model_copy(update={"decision": decision})) == [
        ("0", 0.099),
        ("2", 0.6),
        ("10", 0.3),
    ]


def test_alpha_zero_is_recommended_as_any_other() -> None:
    result = sweep_result((0.0, 0.5, 2.0), best=0.0)
    assert headline(result) == "alpha 0"
    assert [status_of(row, result) for row in result.alphas] == ["recommended", "feasible", "refused"]
