"""A tokenizer that is missing, half there, or another one than base's, is found from the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command import refused, run_here
from tests.models.adapters import factors, write_adapter
from tests.models.raw import write_pair, write_raw

WORDS = [f"word{number}" for number in range(16)]


def write_tokenizer(folder: Path, words: list[str], **model: Any) -> None:
    """A tokenizer of whole words."""
    vocabulary = {"vocab": {word: number for number, word in enumerate(words)}, **model}
    content = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", **vocabulary}}
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(tmp_path)


def flags(base: Path, other: Path, side: str = "aligned") -> list[str]:
    return ["--base", str(base), f"--{side}", str(other), "--alpha", "0.5"]


def warnings(*arguments: str) -> list[str]:
    """What ``inspect`` warns of."""
    result = run_here("inspect", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    found: list[str] = json.loads(result.stdout)["warnings"]
    return found


def test_missing_tokenizer_is_refused_by_the_server_and_warned_of_by_others(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    refused(*flags(*pair), words=("aligned has no tokenizer", "--tokenizer", "--skip-tokenizer-init"))
    (warning,) = warnings(*flags(*pair))
    assert "aligned has no tokenizer" in warning
    for command in (["merge", *flags(*pair)], ["delta", "create", *flags(*pair)[:4]]):
        result = run_here(*command, "--out", str(tmp_path / command[0]))
        assert (result.returncode, "aligned has no tokenizer" in result.stderr) == (0, True)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_half_a_tokenizer_is_refused(pair: tuple[Path, Path], name: str) -> None:
    (pair[1] / name).write_text("{}")
    refused(*flags(*pair), words=("holds half a tokenizer", name))


def test_half_a_tokenizer_of_an_adapter_is_not_replaced_by_that_of_base(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    write_tokenizer(pair[0], WORDS)
    adapter = write_adapter(tmp_path / "adapter", factors("model.layers.0.self_attn.q_proj", 8, 8))
    assert warnings(*flags(pair[0], adapter, "delta")) == []
    (adapter / "tokenizer_config.json").write_text("{}")
    refused(*flags(pair[0], adapter, "delta"), words=("delta: adapter holds half a tokenizer",))
    (warning,) = warnings(*flags(pair[0], adapter, "delta"))
    assert "half a tokenizer" in warning


WHOLE = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.txt", "qwen.tiktoken", "spiece.model",
         "tokenizer.model.v3", "sentencepiece.bpe.model")  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_whole_tokenizers(pair: tuple[Path, Path], name: str) -> None:
    (pair[1] / name).write_text("{}")
    assert warnings(*flags(*pair)) == []


def test_tokenizer_with_code_of_its_own(pair: tuple[Path, Path]) -> None:
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (pair[1] / "tokenizer_config.json").write_text(json.dumps(settings))
    (warning,) = warnings(*flags(*pair))
    assert "half a tokenizer" in warning
    (pair[1] / "tokenization_own.py").write_text("")
    assert warnings(*flags(*pair)) == []


def test_ids_that_mean_other_tokens_are_warned_of_with_the_first_ten(pair: tuple[Path, Path]) -> None:
    write_tokenizer(pair[0], WORDS)
    write_tokenizer(pair[1], WORDS)
    assert warnings(*flags(*pair)) == []
    write_tokenizer(pair[1], [WORDS[0], *WORDS[:0:-1]])
    (warning,) = warnings(*flags(*pair))
    assert warning.startswith("14 token ids mean one token in base and another one")
    assert "1: 'word1' and 'word15', 2: 'word2' and 'word14'" in warning
    assert warning.count(" and 'word") == 10


def test_new_tokens_at_the_end_are_no_difference(pair: tuple[Path, Path]) -> None:
    write_tokenizer(pair[0], WORDS)
    write_tokenizer(pair[1], [*WORDS, "new"])
    assert warnings(*flags(*pair)) == []


def test_added_tokens_count(pair: tuple[Path, Path]) -> None:
    for side, token in zip(pair, ("<pad>", "<tool>"), strict=True):
        write_tokenizer(side, WORDS)
        content = json.loads((side / "tokenizer.json").read_text())
        content["added_tokens"] = [{"id": 16, "content": token}]
        (side / "tokenizer.json").write_text(json.dumps(content))
    (warning,) = warnings(*flags(*pair))
    assert "1 token id" in warning
    assert "16: '<pad>' and '<tool>'" in warning


def test_unigram_lists_and_broken_files(pair: tuple[Path, Path]) -> None:
    for side, words in zip(pair, (WORDS, WORDS[::-1]), strict=True):
        write_tokenizer(side, WORDS, type="Unigram", vocab=[[word, -1.0] for word in words])
    (warning,) = warnings(*flags(*pair))
    assert "16 token ids" in warning
    (pair[1] / "tokenizer.json").write_text("not JSON")
    assert warnings(*flags(*pair)) == []


def test_flags_that_make_it_right_are_seen(tmp_path: Path) -> None:
    from expo_serve.cli.options import read_options
    from expo_serve.cli.serve import _names_tokenizer, parser

    sides = flags(write_raw(tmp_path / "base"), write_raw(tmp_path / "aligned"))
    for more, is_named in (
        (["--tokenizer", "t"], True), (["--tokenizer=t"], True), (["--skip_tokenizer_init"], True),
        (["--tokenizer-mode", "auto"], False), ([], False),
    ):  # fmt: skip
        assert _names_tokenizer(read_options(parser(), [*sides, *more])) is is_named
