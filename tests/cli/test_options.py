"""Our flags on the command line and in a file; what is left for vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from expo_serve.cli.options import Options, add_source_flags, read_options
from expo_serve.cli.parser import Parser
from expo_serve.errors import ConfigError, UsageError

SOURCES = ["--base", "b", "--aligned", "a", "--alpha", "0.5"]


def read(*arguments: str) -> Options:
    """Parse a command line of ours."""
    parser = Parser(prog="expo-serve")
    add_source_flags(parser)
    return read_options(parser, arguments)


def yaml_file(folder: Path, content: object) -> str:
    """A ``--config`` file."""
    file = folder / "serve.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(file)


def test_flags_of_vllm_pass_through_in_their_order() -> None:
    rest = ["--port", "8000", "-tp", "2", "--enforce-eager", "--hf-overrides.x", "{}", "--served-model-name", "a", "b"]
    options = read(*SOURCES, *rest)
    assert options.unknown == rest
    assert options.arguments == rest
    assert read(*rest[:5], *SOURCES, *rest[5:]).arguments == rest


@pytest.mark.parametrize("alpha", ["-1e-3", "-.5", "-0", "-1"])
@pytest.mark.parametrize("form", ["--alpha {}", "--alpha={}"])
def test_negative_alpha(alpha: str, form: str) -> None:
    given = form.format(alpha).split(" ")
    assert read("--base", "b", "--aligned", "a", *given).config.alpha == float(alpha)


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--base_revision", "r"], "base_revision", "r"),
        (["--base_revision=r"], "base_revision", "r"),
        (["--aligned-revision", "r"], "aligned_revision", "r"),
        (["--revision", "r"], "aligned_revision", "r"),
        (["--unmatched", "copy"], "unmatched", "copy"),
        ([], "unmatched", "refuse"),
    ],
)
def test_flag_sets_its_field(flags: list[str], field: str, value: str) -> None:
    options = read(*SOURCES, *flags)
    assert getattr(options.config, field) == value
    assert options.unknown == []


@pytest.mark.parametrize("flag", ["--alpha-rule", "--alpha_rule"])
def test_rules_keep_their_order(flag: str) -> None:
    rules = read(*SOURCES, flag, "-x=1", f"{flag}=y_z=-1").config.alpha_rules
    assert [rule.text for rule in rules] == ["-x=1", "y_z=-1"]


@pytest.mark.parametrize("flag", ["--alph", "--bas", "--align", "--unmatch", "--revisio"])
def test_our_flags_take_no_abbreviations(flag: str) -> None:
    assert flag in read(*SOURCES, flag, "x").unknown


@pytest.mark.parametrize("flag", ["--download-dir", "--download_dir"])
def test_download_folder_holds_for_us_and_for_vllm(flag: str) -> None:
    options = read(*SOURCES, flag, "/d_d")
    assert options.hub.cache_dir == "/d_d"
    assert options.arguments == ["--download-dir", "/d_d"]


@pytest.mark.parametrize("flag", ["--hf-token", "--hf_token"])
def test_token_holds_for_us_and_for_vllm(flag: str) -> None:
    options = read(*SOURCES, flag, "t")
    assert (options.hub.token, options.arguments) == ("t", ["--hf-token", "t"])
    options = read(*SOURCES, flag)
    assert (options.hub.token, options.arguments) == (True, ["--hf-token"])


def test_file_gives_what_the_command_line_does_not(tmp_path: Path) -> None:
    content = {"base": "file-b", "alpha": 0.25, "alpha_rule": ["x=1", "y=2"], "base_revision": "r", "unmatched": "copy"}
    options = read("--aligned", "a", "--base", "b", "--config", yaml_file(tmp_path, {**content, "port": 8000}))
    config = options.config
    assert (config.base, config.aligned, config.alpha, config.base_revision) == ("b", "a", 0.25, "r")
    assert (config.unmatched, [rule.text for rule in config.alpha_rules]) == ("copy", ["x=1", "y=2"])
    assert options.file_options == {"port": 8000}
    assert options.arguments == []


@pytest.mark.parametrize("key", ["revision", "aligned-revision", "aligned_revision"])
def test_aligneds_revision_in_the_file(tmp_path: Path, key: str) -> None:
    options = read(*SOURCES, "--config", yaml_file(tmp_path, {key: "r"}))
    assert options.config.aligned_revision == "r"
    assert options.file_options == {}


def test_one_rule_in_the_file_may_be_a_string(tmp_path: Path) -> None:
    options = read(*SOURCES, "--config", yaml_file(tmp_path, {"alpha-rule": "x=1"}))
    assert [rule.text for rule in options.config.alpha_rules] == ["x=1"]


def test_what_vllm_shares_stays_in_the_file(tmp_path: Path) -> None:
    shared = {"hf-token": "t", "download-dir": "/d"}
    options = read(*SOURCES, "--config", yaml_file(tmp_path, shared))
    assert (options.hub.token, options.hub.cache_dir) == ("t", "/d")
    assert options.file_options == shared


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("alpha: [1]", "--alpha"),
        ("alpha: true", "--alpha"),
        (f"alpha: 1{'0' * 400}", "--alpha"),
        ("alpha: .inf", "--alpha"),
        ("base: [b]", "--base: expected a string, found ['b']"),
        ("base: 5", "--base: expected a string, found 5"),
        ("base-revision: 5", "--base-revision: expected a string, found 5"),
        ("unmatched: yes", "--unmatched: expected 'refuse' or 'copy', found True"),
        ("unmatched: maybe", "--unmatched: expected 'refuse' or 'copy', found 'maybe'"),
        ("alpha-rule: 5", "--alpha-rule: an alpha rule is REGEX=VALUE"),
        ("alpha-rule: [[x=1]]", "--alpha-rule: an alpha rule is REGEX=VALUE"),
        ("alpha-rule: [null]", "--alpha-rule: an alpha rule"),
        ("alpha-rule: {x: 1}", "--alpha-rule: an alpha rule"),
        ("alpha-rule: [{x: 1}]", "--alpha-rule: an alpha rule"),
        ("alpha-rule: ''", "--alpha-rule"),
        ("hf-token: [1]", "--hf-token"),
        ("hf-token: 5", "--hf-token"),
        ("download-dir: 7", "--download-dir"),
        ("revision: a\naligned-revision: b", "two names"),
        ("base_revision: a\nbase-revision: b", "two names"),
        ("model: x", "--model is set by"),
        ("model-loader-extra-config.alpha: 1", "--model-loader-extra-config is set by"),
        ("", "must map"),
        ("- base", "must map"),
        ("5: 6", "must map"),
        ("{", "not valid YAML"),
        ("a: 2024-13-45", "not valid YAML"),
        ("a: !!python/object:os.system x", "not valid YAML"),
        ("a: " + "[" * 500, "not valid YAML"),
    ],
)
def test_wrong_file_is_one_line(tmp_path: Path, content: str, words: str) -> None:
    keys = {"base": "b", "aligned": "a", "alpha": "0.5"}
    flags = [part for key, value in keys.items() if not content.startswith(f"{key}:") for part in (f"--{key}", value)]
    with pytest.raises(UsageError) as caught:
        read(*flags, "--config", yaml_file(tmp_path, content))
    assert words in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["", "x.json", "missing.yaml", "folder.yaml"])
def test_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="--config"):
        read(*SOURCES, "--config", str(tmp_path / name) if name else "")


@pytest.mark.parametrize("flags", [["--base"], ["--alpha"], ["--unmatched"], ["--base", "--alpha", "1"]])
def test_flag_without_its_value_is_refused(flags: list[str]) -> None:
    with pytest.raises(UsageError, match=f"{flags[0]}: expected one argument"):
        read(*flags)


@pytest.mark.parametrize("values", [{"base": ""}, {"aligned": ""}, {"alpha": ""}])
def test_empty_value_is_refused(values: dict[str, Any]) -> None:
    given = {"base": "b", "aligned": "a", "alpha": "1", **values}
    with pytest.raises(UsageError, match=f"--{next(iter(values))} is empty"):
        read(*[part for key, value in given.items() for part in (f"--{key}", value)])


def test_number_that_is_no_alpha_is_named_by_its_flag() -> None:
    with pytest.raises(UsageError, match=r"^--alpha: alpha must be a decimal .* found 'x'$"):
        read("--base", "b", "--aligned", "a", "--alpha", "x")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--aligned", "a", "--delta", "d"], "--aligned and --delta are both given: leave one out"),
        (["--aligned", "a", "--delta-revision", "r"], "--delta-revision is given, but --delta is not"),
        (["--delta", "d", "--aligned-revision", "r"], "--aligned-revision is given, but --aligned is not"),
    ],
)
def test_rules_over_several_keys_are_told_with_flags(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read("--base", "b", "--alpha", "1", *flags)
    assert caught.value.message == message
