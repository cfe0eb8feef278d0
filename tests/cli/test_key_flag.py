"""An API key that would leave every route open is refused before anything else is looked at, in every spelling."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import assert_refusal, assert_refused_alike, refused, run_here

PAIR = ("--base", "no-such-base", "--aligned", "no-such-aligned", "--alpha", "0.5")

EMPTY: dict[str, list[str]] = {
    "a value": ["--api-key", ""],
    "a value, =": ["--api-key="],
    "underscore": ["--api_key", ""],
    "underscore, =": ["--api_key="],
    "no value": ["--api-key"],
    "no value before a flag": ["--api-key", "--port", "8001"],
    "one of two": ["--api-key", "good", ""],
    "white": ["--api-key", " \t"],
    "abbreviated": ["--api-k", ""],
    "abbreviated, underscore, =": ["--api_ke="],
    "what vLLM reads as empty": ["--api-key", "None"],
    "the last of two flags": ["--api-key", "good", "--api-key", ""],
}


def passes(*arguments: str, variable: str | None = None) -> None:
    """Nothing is wrong with the keys: what is refused is the base that is not there."""
    environment = {} if variable is None else {"VLLM_API_KEY": variable}
    assert_refusal(run_here(*PAIR, *arguments, **environment), ("no-such-base",))


@pytest.mark.parametrize("flags", EMPTY.values(), ids=EMPTY)
def test_empty_flag(flags: list[str]) -> None:
    printed = refused(*PAIR, *flags, words=("--api-key is empty", "every route would be open"), VLLM_API_KEY="good")
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize("key", ["", " ", "\n"])
def test_empty_variable(key: str) -> None:
    printed = refused(*PAIR, words=("VLLM_API_KEY is empty", "every route would be open"), VLLM_API_KEY=key)
    assert len(printed.splitlines()) == 1


def test_command_refuses_alike() -> None:
    assert_refused_alike(*PAIR, "--api-key", "", words=("--api-key is empty",))
    assert_refused_alike(*PAIR, words=("VLLM_API_KEY is empty",), VLLM_API_KEY="")


@pytest.mark.locked
@pytest.mark.parametrize("flags", [["--api-key", "good"], ["--api_key=good"], ["--api-k", "good", "better"]])
def test_flag_comes_before_an_empty_variable(flags: list[str]) -> None:
    passes(*flags, variable="")


@pytest.mark.locked
def test_key_or_no_key_at_all_passes() -> None:
    passes()
    passes(variable="good")
    passes("--port", "8001", "--api-server-count", "1")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('api-key: ""', ("--api-key is empty",)),
        ('api_key: ""', ("--api-key is empty",)),
        ('api-k: ""', ("--api-key is empty",)),
        ("api-key: []", ("--api-key is empty",)),
        ('api-key: [good, ""]', ("--api-key is empty",)),
        ("api-key: None", ("--api-key is empty",)),
        ("api-key:", ("--config", "api-key", "string in quotes")),
        ("api-key: true", ("--config", "api-key", "string in quotes")),
        ("api-key: 0123", ("--config", "api-key", "string in quotes")),
        ("api-key: [good, 1]", ("--config", "api-key", "string in quotes")),
        ("api-key: {good: 1}", ("--config", "api-key", "string in quotes")),
    ],
)
def test_key_of_a_file(tmp_path: Path, line: str, words: tuple[str, ...]) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text(f"{line}\n")
    printed = refused(*PAIR, "--config", str(file), words=words, VLLM_API_KEY="good")
    assert len(printed.splitlines()) == 1
    assert "good" not in printed


@pytest.mark.locked
@pytest.mark.parametrize("line", ["api-key: good", 'api_key: "0123"', "api-key: [good, better]"])
def test_good_key_of_a_file_passes(tmp_path: Path, line: str) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text(f"{line}\n")
    passes("--config", str(file), variable="")


@pytest.mark.locked
def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text('api-key: ""\n')
    passes("--config", str(file), "--api-key", "good")
