"""API keys: which are required, which are refused, and that their form in a header is equal where their bytes are."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expo_serve.errors import UsageError
from expo_serve.keys import as_in_header, required_keys


@pytest.mark.parametrize(
    ("flag", "environment", "expected"),
    [
        (None, {}, []),
        (None, {"VLLM_API_KEY": "a"}, ["a"]),
        (["b"], {"VLLM_API_KEY": "a"}, ["b"]),
        (["b", "c d"], {"VLLM_API_KEY": ""}, ["b", "c d"]),
        (None, {"VLLM_API_KEY": "None"}, ["None"]),
    ],
)
def test_the_flag_comes_before_the_variable(
    flag: list[str | None] | None, environment: dict[str, str], expected: list[str]
) -> None:
    assert required_keys(flag, environment) == expected


@pytest.mark.parametrize("flag", [[], [""], ["a", ""], [None], ["None"], [" "], ["\t\n"], ["\u00a0"]])
def test_empty_key_of_the_flag_is_refused(flag: list[str | None]) -> None:
    with pytest.raises(UsageError, match=r"^--api-key is empty"):
        required_keys(flag, {"VLLM_API_KEY": "good"})


@pytest.mark.parametrize("key", ["", " ", "\n", "\r\n"])
def test_empty_key_of_the_variable_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match=r"^VLLM_API_KEY is empty"):
        required_keys(None, {"VLLM_API_KEY": key})


@pytest.mark.parametrize("key", ["hidden\n", " hidden", "hid\nden", "hid\x7fden", "hid\0den", "hidden\ud800"])
def test_key_that_no_request_can_send_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(UsageError, match=r"^VLLM_API_KEY has ") as caught:
        required_keys(None, {"VLLM_API_KEY": key})
    assert "hid" not in caught.value.message
    assert caught.value.message.isprintable()


@given(st.binary())
def test_form_in_a_header_has_a_character_for_each_byte(sent: bytes) -> None:
    """As a variable is read, and as a web framework reads a header."""
    assert as_in_header(sent.decode("utf-8", "surrogateescape")) == sent.decode("latin-1")


def test_variable_that_is_not_utf_8_keeps_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environb, b"VLLM_API_KEY", b"\xff\xe9")
    (key,) = required_keys(None, os.environ)
    assert as_in_header(key).encode("latin-1") == b"\xff\xe9"
