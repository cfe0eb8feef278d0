"""Every call, configuration, source and pair that is refused, asked of the command's ``main``; a dozen of them, of
every kind, of the real command too.

None of these cases gets as far as importing vLLM. Damaged files are in ``test_refused_files``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command import assert_refused_alike, refused, refused_by_command
from tests.models.raw import tiny_tensors, write_pair, write_raw

RANGE = "from -10000 to 10000"
OURS = "is set by expo-serve"
Pair = tuple[str, str]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair that would be served."""
    base, aligned = write_pair(tmp_path_factory.mktemp("pair"))
    return str(base), str(aligned)


@pytest.mark.parametrize("alpha", ["nan", "inf", "-inf", "0,5", "", "1e6", "-1e6", "0x1", "half"])
def test_alpha_that_is_no_number_in_range_is_refused(pair: Pair, alpha: str) -> None:
    refused("--base", pair[0], "--aligned", pair[1], "--alpha", alpha, words=("--alpha", RANGE))


@pytest.mark.parametrize("missing", ["base", "aligned", "alpha"])
def test_missing_flag_is_named(pair: Pair, missing: str) -> None:
    given = {"base": pair[0], "aligned": pair[1], "alpha": "0.5"}
    flags = [part for name, value in given.items() if name != missing for part in (f"--{name}", value)]
    refused(*flags, words=(f"--{missing} is missing", RANGE if missing == "alpha" else "a folder or hub id"))


FLAGS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "model": (["--model", "x"], ("--model", OURS)),
    "model with =": (["--model=x"], ("--model", OURS)),
    "load format": (["--load-format", "dummy"], ("--load-format", OURS)),
    "load format, underscores": (["--load_format", "dummy"], ("--load-format", OURS)),
    "load format with =": (["--load-format=dummy"], ("--load-format", OURS)),
    "extra config": (["--model-loader-extra-config", "{}"], ("--model-loader-extra-config", OURS)),
    "extra config, dotted": (["--model-loader-extra-config.alpha", "1"], ("--model-loader-extra-config", OURS)),
    "extra config, dotted, underscores": (["--model_loader_extra_config.alpha=1"], (OURS,)),
    "worker extension": (["--worker-extension-cls", "x.Y"], ("--worker-extension-cls", OURS)),
    "worker extension, underscores, =": (["--worker_extension_cls=x.Y"], ("--worker-extension-cls", OURS)),
    "a model in the middle": (["some/model"], ("unexpected", "some/model")),
    "rule without value": (["--alpha-rule", "embed"], ("--alpha-rule", "REGEX=VALUE")),
    "rule without pattern": (["--alpha-rule", "=0"], ("--alpha-rule", "REGEX=VALUE")),
    "rule with a bad pattern": (["--alpha-rule", "(embed=0"], ("--alpha-rule", "regular expression")),
    "rule with a bad alpha": (["--alpha-rule", "embed=nan"], ("--alpha-rule", RANGE)),
    "rule that matches nothing": (["--alpha-rule", "no_such=0"], ("no_such=0", "matches no tensor")),
    "unmatched": (["--unmatched", "maybe"], ("--unmatched", "refuse", "copy")),
    "alpha without value": (["--alpha"], ("--alpha", "expected one argument")),
    "revision of a folder": (["--base-revision", "main"], ("base", "revision", "is a folder")),
    "vLLM's revision means aligned's": (["--revision", "main"], ("aligned", "revision", "is a folder")),
    "empty config file name": (["--config", ""], ("--config", ".yaml")),
    "config file of another kind": (["--config", "x.json"], ("--config", ".yaml")),
    "config file that is missing": (["--config", "/no/such.yaml"], ("--config", "/no/such.yaml")),
}


@pytest.mark.parametrize(("flags", "words"), FLAGS.values(), ids=FLAGS)
def test_wrong_flag_is_refused(pair: Pair, flags: list[str], words: tuple[str, ...]) -> None:
    refused("--base", pair[0], "--aligned", pair[1], "--alpha", "0.5", *flags, words=words)


@pytest.mark.parametrize("name", ["load format with =", "rule that matches nothing", "alpha without value"])
def test_wrong_flag_is_refused_by_the_command(pair: Pair, name: str) -> None:
    flags, words = FLAGS[name]
    assert_refused_alike("--base", pair[0], "--aligned", pair[1], "--alpha", "0.5", *flags, words=words)


def test_positional_model_is_refused(pair: Pair) -> None:
    refused("some/model", "--base", pair[0], words=("some/model", "--base and --aligned"))


YAML: dict[str, tuple[str, tuple[str, ...]]] = {
    "model": ("model: x", ("--model", OURS)),
    "load format": ("load-format: dummy", ("--load-format", OURS)),
    "load format, underscores": ("load_format: dummy", ("--load-format", OURS)),
    "extra config": ("model-loader-extra-config: {alpha: 1}", (OURS,)),
    "extra config, dotted": ("model-loader-extra-config.alpha: 1", (OURS,)),
    "worker extension": ("worker_extension_cls: x.Y", (OURS,)),
    "alpha a list": ("alpha: [1]", ("alpha", RANGE)),
    "alpha a comma": ("alpha: 0,5", ("alpha", RANGE)),
    "base revision a number": ("base-revision: 5", ("base-revision",)),
    "unmatched unknown": ("unmatched: maybe", ("unmatched", "refuse", "copy")),
    "rule a mapping": ("alpha-rule: {embed: 0}", ("alpha-rule", "REGEX=VALUE")),
    "no mapping": ("- alpha", ("--config", "map")),
    "no YAML": ("{", ("--config", "not valid YAML")),
}


def test_wrong_config_file_is_refused_by_the_command(pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(YAML["extra config"][0])
    flags = ("--base", pair[0], "--aligned", pair[1], "--alpha", "0.5", "--config", str(file))
    assert_refused_alike(*flags, words=YAML["extra config"][1])


@pytest.mark.parametrize(("text", "words"), YAML.values(), ids=YAML)
def test_wrong_config_file_is_refused(pair: Pair, tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    alpha = [] if text.startswith("alpha:") else ["--alpha", "0.5"]
    refused("--base", pair[0], "--aligned", pair[1], *alpha, "--config", str(file), words=words)


def test_source_of_the_config_file_must_be_a_string(pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("base: [a]")
    words = ("--base: expected a string, found ['a']",)
    refused("--aligned", pair[1], "--alpha", "0.5", "--config", str(file), words=words)


@pytest.mark.parametrize(
    "variable", ["VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_USE_RUST_FRONTEND"]
)
def test_variable_that_opens_routes_to_the_weights_is_refused(pair: Pair, variable: str) -> None:
    flags = ("--base", pair[0], "--aligned", pair[1], "--alpha", "0.5")
    assert_refused_alike(*flags, words=(variable, "alpha", "; unset it"), **{variable: "1"})  # type: ignore[arg-type]


def _a_file(folder: Path) -> str:
    (folder / "file").write_text("x")
    return str(folder / "file")


def _empty_folder(folder: Path) -> str:
    (folder / "empty").mkdir()
    return str(folder / "empty")


SOURCES: dict[str, tuple[Callable[[Path], str], tuple[str, ...]]] = {
    "missing path": (lambda folder: f"{folder}/missing", ("missing", "does not exist")),
    "a file": (_a_file, ("is a file", "give the folder")),
    "an empty folder": (_empty_folder, ("no config.json",)),
    "s3": (lambda folder: "s3://bucket/model", ("s3://bucket/model", "not supported", "download or mount")),
    "gs": (lambda folder: "gs://bucket/model", ("gs://bucket/model", "not supported", "download or mount")),
}


@pytest.mark.parametrize("side", ["base", "aligned"])
@pytest.mark.parametrize(("make", "words"), SOURCES.values(), ids=SOURCES)
def test_source_that_is_not_there_is_refused_and_the_side_named(
    pair: Pair, tmp_path: Path, side: str, make: Callable[[Path], str], words: tuple[str, ...]
) -> None:
    given = {"base": pair[0], "aligned": pair[1], side: make(tmp_path)}
    flags = ("--base", given["base"], "--aligned", given["aligned"], "--alpha", "0.5")
    refused(*flags, words=(f"error: {side}:", *words))


@pytest.mark.parametrize("side", ["base", "aligned"])
def test_hub_id_that_is_not_in_the_cache_is_refused_by_the_command(pair: Pair, tmp_path: Path, side: str) -> None:
    given = {"base": pair[0], "aligned": pair[1], side: "nobody/nothing"}
    flags = ("--base", given["base"], "--aligned", given["aligned"], "--alpha", "0.5")
    words = (f"error: {side}:", "nobody/nothing", "not in the hub cache")
    refused_by_command(*flags, words=words, HF_HOME=str(tmp_path / "hub"))


def _other_dtype_kind() -> dict[str, torch.Tensor]:
    tensors = tiny_tensors()
    return {**tensors, "lm_head.weight": tensors["lm_head.weight"].to(torch.int32)}


PAIRS: dict[str, tuple[Callable[[], dict[str, torch.Tensor]], dict[str, Any], tuple[str, ...]]] = {
    "architecture": (tiny_tensors, {"model_type": "qwen2"}, ("different architectures", "llama", "qwen2")),
    "architectures": (tiny_tensors, {"architectures": ["Other"]}, ("different architectures", "Other")),
    "hidden size": (
        lambda: tiny_tensors(hidden=16),
        {"hidden_size": 16},
        (
            "shape or kind differs in 8 of 8 tensors",
            "hidden_size is 8 in base and 16 in aligned",
            "base BF16 [16, 8], aligned BF16 [16, 16]",
        ),
    ),
    "hidden size of many layers": (
        lambda: tiny_tensors(hidden=16, layers=12),
        {"hidden_size": 16},
        ("shape or kind differs in 8 of 38 tensors",),
    ),
    "layers": (
        lambda: tiny_tensors(layers=6),
        {"num_hidden_layers": 6},
        (
            "12 tensors are in one checkpoint only",
            "num_hidden_layers is 2 in base and 6 in aligned",
            "only in aligned: ",
            "and 2 more",
        ),
    ),
    "fewer layers": (
        lambda: tiny_tensors(layers=1),
        {"num_hidden_layers": 1},
        ("3 tensors are in one checkpoint only", "only in base: model.layers.1.input_layernorm.weight [8]"),
    ),
    "integers on one side": (_other_dtype_kind, {}, ("lm_head.weight", "BF16", "I32")),
}


@pytest.mark.parametrize(("make", "config", "words"), PAIRS.values(), ids=PAIRS)
def test_two_checkpoints_that_are_no_pair_are_refused(
    pair: Pair,
    tmp_path: Path,
    make: Callable[[], dict[str, torch.Tensor]],
    config: dict[str, Any],
    words: tuple[str, ...],
) -> None:
    other = write_raw(tmp_path / "other", make(), **config)
    refused("--base", pair[0], "--aligned", str(other), "--alpha", "0.5", words=words)


@pytest.mark.parametrize("name", ["hidden size", "layers"])
def test_what_is_no_pair_is_refused_by_the_command(pair: Pair, tmp_path: Path, name: str) -> None:
    make, config, words = PAIRS[name]
    other = write_raw(tmp_path / "other", make(), **config)
    assert_refused_alike("--base", pair[0], "--aligned", str(other), "--alpha", "0.5", words=words)
