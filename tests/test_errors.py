"""How an error and a warning are printed: details first, one summary line last, a traceback only when asked for."""

from __future__ import annotations

import pytest

from expo_serve import errors
from expo_serve.errors import PairError

ERROR = PairError("no pair", [f"detail {number}" for number in range(12)])


def test_details_come_first_and_one_summary_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("EXPO_DEBUG", raising=False)
    errors.show(ERROR)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        *(f"  detail {number}" for number in range(10)),
        "  ... and 2 more",
        "expo-serve: error: no pair",
    ]


@pytest.mark.parametrize(("value", "is_shown"), [("1", True), ("0", False), ("", False)])
def test_traceback_is_printed_before_it_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str, is_shown: bool
) -> None:
    monkeypatch.setenv("EXPO_DEBUG", value)
    try:
        raise ERROR
    except PairError as error:
        errors.show(error)
    lines = capsys.readouterr().err.splitlines()
    assert (lines[0] == "Traceback (most recent call last):") == is_shown
    assert lines[-1] == "expo-serve: error: no pair"


def test_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    errors.warn("look here")
    assert capsys.readouterr().err == "expo-serve: warning: look here\n"
