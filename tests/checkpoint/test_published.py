"""The published pairs: what the data must say, and how a name finds one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from expo_serve.checkpoint import published
from expo_serve.checkpoint.published import PublishedFiles, PublishedPair, find_pair, published_pairs
from expo_serve.config import parse_alpha
from expo_serve.errors import UsageError

PAIRS = published_pairs().pairs
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
UNKNOWN = PublishedFiles(format=None, conversions=(), note="not looked up")
SAFE = PublishedFiles(format="safetensors", conversions=(), note="")
PICKLES = PublishedFiles(format=".bin", conversions=(), note="")
CONVERTED = PublishedFiles(format=".bin", conversions=(2, 4), note="")


def pair(base: PublishedFiles, aligned: PublishedFiles) -> PublishedPair:
    """A pair with these files."""
    return PublishedPair(base="o/b", aligned="o/a", alpha=0.5, source="x", base_files=base, aligned_files=aligned)


def test_both_tables_are_there() -> None:
    tables = [one.source.rpartition(", ")[2] for one in PAIRS]
    assert (tables.count("Table 7"), tables.count("Table 6"), len(PAIRS)) == (12, 14, 27)
    assert {one.name for one in PAIRS if one.name.startswith("internlm2")} == {
        "internlm2-chat-1_8b", "internlm2-chat-7b", "internlm2-chat-20b"
    }  # fmt: skip


def test_names_and_hub_ids_are_unique() -> None:
    for key in ("name", "aligned"):
        found = [getattr(one, key).lower() for one in PAIRS]
        assert len(set(found)) == len(found)
    for one in PAIRS:
        assert HUB_ID.fullmatch(one.base)
        assert HUB_ID.fullmatch(one.aligned)
        assert one.base != one.aligned


def test_alphas_are_those_of_the_search() -> None:
    """The authors tried 0.1 to 0.5 on published pairs; one of them found none."""
    assert [one.name for one in PAIRS if one.alpha is None] == ["Mistral-7B-Base-SFT-KTO"]
    for one in PAIRS:
        if one.alpha is not None:
            assert 0.1 <= parse_alpha(one.alpha) <= 0.5


def test_what_is_not_known_says_so() -> None:
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", published_pairs().looked_up)
    for one in PAIRS:
        for side in (one.base_files, one.aligned_files):
            assert side.format or side.note in ("not looked up", "no list of files found")
            assert side.format == ".bin" or not side.conversions
            assert list(side.conversions) == sorted(set(side.conversions))


@pytest.mark.parametrize(
    "given", ["zephyr-7b-beta", "Zephyr-7B-Beta", " zephyr-7b-beta ", "huggingfaceh4/zephyr-7b-beta"]
)
def test_a_pair_is_found_by_its_name_and_by_its_hub_id(given: str) -> None:
    assert find_pair(given, "--pair").aligned == "HuggingFaceH4/zephyr-7b-beta"


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("zephyr", ["zephyr-7b-alpha", "zephyr-7b-beta", "zephyr-7b-dpo-full"]),
        ("zephyr-7b-betta", ["zephyr-7b-beta"]),
        ("allenai/tulu-2-70b", ["tulu-2-dpo-70b"]),
        ("simpo", ["Mistral-7B-Base-SFT-SimPO", "Llama-3-Base-8B-SFT-SimPO"]),
    ],
)
def test_an_unknown_name_is_refused_with_near_ones(given: str, near: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        find_pair(given, "--pair")
    message = caught.value.message
    assert message.startswith(f"--pair: no published pair is named {given!r}; did you mean ")
    assert all(name in message for name in near)
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize("given", ["", "xyzzy", "q" * 10_000, 7.5, "a\nb", None])
def test_a_name_like_none_is_refused_without_guesses(given: object) -> None:
    with pytest.raises(UsageError) as caught:
        find_pair(given, "pairs")
    assert "did you mean" not in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("base", "aligned", "flags"),
    [
        (SAFE, SAFE, []),
        (UNKNOWN, SAFE, []),
        (PICKLES, SAFE, ["--allow-pickle-index"]),
        (PICKLES, PICKLES, ["--allow-pickle-index"]),
        (SAFE, CONVERTED, ["--aligned-revision", "refs/pr/4"]),
        (CONVERTED, PICKLES, ["--base-revision", "refs/pr/4", "--allow-pickle-index"]),
    ],
)
def test_flags_that_a_side_without_safetensors_needs(
    base: PublishedFiles, aligned: PublishedFiles, flags: list[str]
) -> None:
    assert pair(base, aligned).access_flags == flags


def test_formats_in_words() -> None:
    words = [one.text for one in (UNKNOWN, SAFE, PICKLES, CONVERTED)]
    assert words == ["not looked up", "safetensors", ".bin", ".bin, PR 2, 4"]
    assert PublishedFiles(format=".bin", conversions=(), note="by its tag").text == ".bin, by its tag"


def test_data_with_a_mistake_is_found() -> None:
    text = Path(published.__file__).with_name("published.json").read_text()
    assert published.PublishedPairs.model_validate_json(text) == published_pairs()
    with pytest.raises(ValidationError, match="alfa"):
        published.PublishedPairs.model_validate_json(text.replace('"alpha"', '"alfa"', 1))
