"""Whatever is shown is short and one line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expo_serve.shown import plain, shown

VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner), st.tuples(inner)),
)


@given(VALUES, st.integers(0, 300))
def test_any_value_is_short_and_printable(value: object, most: int) -> None:
    for text in (shown(value, most), plain(value, most)):
        assert len(text) <= most
        assert text.isprintable()


def _nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value, value]
    return value


SHOWN: dict[str, tuple[object, str]] = {
    "5000 digits": (10**5000, "an integer of 16610 bits"),
    "doubled 10,000 times": (_nested(10_000), "[[[[...], [...]], [[...], [...]]], [[[...], [...]], [[...], [...]]]]"),
    "small": ({"a": 1, "b": None}, "{'a': 1, 'b': None}"),
    "control characters": ("x\n\x1b[31m\u202e\ud800", r"'x\n\x1b[31m\u202e\ud800'"),
    "bool": (True, "True"),
}


@pytest.mark.parametrize(("value", "expected"), SHOWN.values(), ids=SHOWN)
def test_shown(value: object, expected: str) -> None:
    assert shown(value, 200) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [("gptq", "gptq"), ("a\nb\ud800鍵", r"a\nb\ud800\u9375"), ("鍵", "鍵"), (["x"], "['x']")]
)
def test_plain_has_no_quotes(value: object, expected: str) -> None:
    assert plain(value) == expected
