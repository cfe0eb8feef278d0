"""Alpha's canonical form, the rules, and what a configuration may hold."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expo_serve.config import (
    AlphaRule,
    ExpoConfig,
    Pinned,
    Source,
    alpha_for,
    deployment_id,
    format_alpha,
    parse_alpha,
    parse_alpha_rule,
    parse_config,
)
from expo_serve.errors import ConfigError

ALPHAS = st.floats(-10_000, 10_000)


@pytest.mark.parametrize(
    ("alpha", "text"),
    [
        (0.5, "0.5"),
        (1, "1"),
        (0, "0"),
        (-0.25, "-0.25"),
        (1e-7, "0.0000001"),
        (-0.0, "0"),
        (10_000.0, "10000"),
        (-1, "-1"),
        (0.1, "0.1"),
        (1.70, "1.7"),
        (10.0, "10"),
    ],
)
def test_alpha_has_one_text(alpha: float, text: str) -> None:
    assert format_alpha(alpha) == text
    assert ExpoConfig(base="b", alpha=alpha).alpha_text == text


@given(ALPHAS)
def test_text_gives_the_number_back(alpha: float) -> None:
    text = format_alpha(alpha)
    assert parse_alpha(text) == alpha
    assert format_alpha(parse_alpha(text)) == text
    assert not set(text) & set("eE+ ")


@pytest.mark.parametrize(
    ("given", "alpha"),
    [
        ("0.50", 0.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("+1", 1.0),
        ("-1e-3", -0.001),
        (" 2 ", 2.0),
        (3, 3.0),
        (-10_000, -10_000.0),
    ],
)
def test_alpha_is_any_decimal(given: object, alpha: float) -> None:
    assert parse_alpha(given) == alpha


@pytest.mark.parametrize(
    "given",
    [
        *("", " ", "nan", "inf", "-inf", "0,5", "1e6", "1e999", "10000.01", "0x1", "1_0", "1 2", "--1", "half"),
        *(math.nan, math.inf, 10_001, -10_001, 10**400, True, None, [], {}, b"1"),
    ],
)
def test_anything_else_is_no_alpha(given: object) -> None:
    with pytest.raises(ValueError, match="from -10000 to 10000"):
        parse_alpha(given)


@given(st.text(max_size=8) | st.integers() | st.floats())
def test_parse_never_gives_another_error_nor_a_number_out_of_range(given: object) -> None:
    try:
        found = parse_alpha(given)
    except ValueError:
        return
    assert abs(found) <= 10_000


@pytest.mark.parametrize(
    ("given", "pattern", "alpha"),
    [
        ("embed|lm_head=0", "embed|lm_head", 0.0),
        ("a=b=1.5", "a=b", 1.5),
        (r"\.(?=mlp)=-1", r"\.(?=mlp)", -1.0),
        ({"pattern": "x", "alpha": 2}, "x", 2.0),
        (AlphaRule(pattern="x", alpha=1), "x", 1.0),
    ],
)
def test_rule_is_a_pattern_and_an_alpha(given: object, pattern: str, alpha: float) -> None:
    rule = parse_alpha_rule(given)
    assert (rule.pattern, rule.alpha) == (pattern, alpha)
    assert parse_alpha_rule(rule.text) == rule


@pytest.mark.parametrize(
    "given",
    [
        *("", "x", "=1", "x=", "x=nan", "x=1e6", "(=1", "*=1", 5, None),
        *({"embed": 0}, {"pattern": "x"}, {"pattern": "x", "alpha": 1, "more": 2}, {"pattern": "", "alpha": 1}),
    ],
)
def test_anything_else_is_no_rule(given: object) -> None:
    with pytest.raises(ValueError, match="alpha rule"):
        parse_alpha_rule(given)


def test_first_rule_that_matches_decides() -> None:
    rules = (parse_alpha_rule("b=1"), parse_alpha_rule("ab=2"))
    assert [alpha_for(name, 0.5, rules) for name in ("ab", "b", "a", "xbx")] == [1, 1, 0.5, 1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"alpha": 0.5}, ["base is missing: expected a folder or hub id"]),
        ({"base": "b"}, ["alpha is missing: expected a decimal number from -10000 to 10000"]),
        ({"base": "b", "alpha": 0.5, "alhpa": 1}, ["unknown key 'alhpa'", "known keys: base, alpha, aligned"]),
        ({"base": "b", "alpha": "0,5"}, ["alpha", "from -10000 to 10000"]),
        ({"base": 5, "alpha": 0.5}, ["base: expected a string, found 5"]),
        (
            {"base": "b", "alpha": 0.5, "unmatched": "ignore"},
            ["unmatched: expected 'refuse' or 'copy', found 'ignore'"],
        ),
        ({"base": "b", "alpha": 0.5, "alpha_rules": ["x"]}, ["alpha_rules.0", "REGEX=VALUE"]),
        ({"base": "b", "alpha": 0.5, "alpha_rules": [{"x": 1}]}, ["alpha_rules.0", "REGEX=VALUE"]),
        ({"base": "b", "alpha": 0.5, "alpha_rules": "x=1"}, ["alpha_rules"]),
        (
            {"base": "b", "alpha": 0.5, "aligned": "a", "delta": "d"},
            ["aligned and delta are both given: leave one out"],
        ),
        ({"base": "b", "alpha": 0.5, "delta_revision": "r"}, ["delta_revision is given, but delta is not"]),
        (
            {"base": "b", "alpha": 0.5, "delta": "d", "aligned_revision": "r"},
            ["aligned_revision is given, but aligned is not"],
        ),
        ({"base": "b", "alpha": 0.5, "pinned": {}}, ["pinned"]),
    ],
)
def test_wrong_configuration_is_one_line(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(values, "--model-loader-extra-config")
    assert caught.value.message.startswith("--model-loader-extra-config: ")
    assert "\n" not in caught.value.message
    assert all(word in caught.value.message for word in words), caught.value.message


@given(ALPHAS, st.lists(st.tuples(st.sampled_from(["a", "b|c", "=", r"\d="]), ALPHAS), max_size=3))
def test_configuration_survives_the_way_to_a_worker(alpha: float, rules: list[tuple[str, float]]) -> None:
    config = ExpoConfig(base="b", alpha=alpha, alpha_rules=tuple(AlphaRule(pattern=p, alpha=a) for p, a in rules))
    carried = json.loads(config.model_dump_json(exclude_defaults=True))
    assert parse_config(carried, "there") == config


def test_source_tells_its_short_name() -> None:
    assert Source(name="org/name", path="/x").short_name == "name"


@pytest.mark.parametrize(("given", "seed"), [(0, 0), ("7", 7), (" 7 ", 7), (2**32 - 1, 2**32 - 1)])
def test_seed_is_an_integer_of_32_bits(given: object, seed: int) -> None:
    assert ExpoConfig(base="b", alpha=0.5, rounding_seed=given).how_to_round == ("dithered", seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [-1, 2**32, "-1", "1.5", 1.5, "", "one", True, None, "٣"])
def test_anything_else_is_no_seed(given: object) -> None:
    with pytest.raises(ConfigError, match="rounding_seed: the seed must be an integer from 0 to 4294967295; found"):
        parse_config({"base": "b", "alpha": 0.5, "rounding_seed": given})


def test_rounding_is_one_of_two() -> None:
    with pytest.raises(ConfigError, match="rounding: expected 'dithered' or 'nearest', found 'up'"):
        parse_config({"base": "b", "alpha": 0.5, "rounding": "up"})


def deployment(**changes: Any) -> str:
    """The digest of a deployment whose sources are pinned."""
    sources = {"base": Source(name="b", path="/b", fingerprint="1"), "aligned": Source(name="a", path="/a")}
    pinned = {key: changes.pop(key, source) for key, source in sources.items()}
    started = changes.pop("started", 1.0)
    config = ExpoConfig(base="b", alpha=0.5, pinned=Pinned(**pinned, started=started), **changes)
    return deployment_id(config, "/a", None)


def test_deployment_has_one_digest() -> None:
    assert deployment() == deployment(started=2.0)
    assert len(deployment()) == 16
    assert deployment(rounding="nearest") == deployment(rounding="nearest", rounding_seed=3)
    hub = Source(name="org/a", path="/cache/1", revision="c0ffee")
    assert deployment(aligned=hub) == deployment(aligned=hub.model_copy(update={"path": "/cache/2"}))


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha_rules": ("lm_head=0",)},
        {"rounding": "nearest"},
        {"rounding_seed": 1},
        {"unmatched": "copy"},
        {"aligned": Source(name="a", path="/other")},
        {"base": Source(name="b", path="/b", fingerprint="2")},
        {"aligned": Source(name="a", path="/a", revision="c0ffee")},
    ],
)
def test_other_deployments_have_other_digests(changes: dict[str, Any]) -> None:
    assert deployment(**changes) != deployment()
