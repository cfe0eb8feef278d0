"""A configuration that vLLM refuses is told from a start that failed, and vLLM's own sentence is found."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expo_serve.errors import ConfigError, PairError
from expo_serve.vllm_plugin.plain_vllm import refuse_elastic_experts
from expo_serve.vllm_plugin.refused import CHECKS, COMMANDS, sentence_of
from tests.children import ask

Raised = Callable[..., BaseException]

MODULE = """
from pydantic import Field
from pydantic.dataclasses import dataclass

@dataclass
class VllmConfig:
    utilization: float = Field(default=0.9, gt=0, le=1)
    seats: int = Field(default=1, ge=1)
    heads: int = 8

    def __post_init__(self):
        if self.heads % 2:
            raise ValueError(
                f"Total number of attention heads ({self.heads})\\nmust be even."
            )

def create_engine_config(what, *given):
    return what(*given)

def validate_api_server_args(names):
    raise KeyError(
        f"invalid tool call parser: {names}"
    )

def build_async_engine_client():
    raise RuntimeError("Engine core initialization failed. See root cause above.")

def logged(text, *values):
    raise RuntimeError(text, *values)

def refuse(kind, *given):
    raise kind(*given)

def slip():
    return {}["no such key"]

def read(number):
    return int(number)

def cmd(what):
    if what is None:
        raise ValueError("--api-server-count=2 cannot be used with --headless")
    return what()
"""


@pytest.fixture
def module(tmp_path: Path) -> dict[str, Any]:
    """Functions with the names of vLLM's."""
    file = tmp_path / "arg_utils.py"
    file.write_text(MODULE)
    names: dict[str, Any] = {"__name__": "vllm.engine.arg_utils"}
    exec(compile(MODULE, file, "exec", dont_inherit=True), names)
    return names


def raised(function: Callable[..., Any], *given: Any, **fields: Any) -> BaseException:
    """What a call raises."""
    try:
        function(*given, **fields)
    except BaseException as error:  # noqa: BLE001 - whatever it is
        return error
    raise AssertionError("it raised nothing")


def checked(module: dict[str, Any], what: Callable[..., Any], *given: Any) -> str | None:
    """The sentence about what is raised while vLLM makes its configuration."""
    return sentence_of(raised(module["create_engine_config"], what, *given))


def test_exception_of_vllm_is_unwrapped(module: dict[str, Any]) -> None:
    found = checked(module, lambda: module["VllmConfig"](heads=9))
    assert found == "Total number of attention heads (9) must be even."


def test_value_of_a_field_is_named(module: dict[str, Any]) -> None:
    found = checked(module, lambda: module["VllmConfig"](utilization=2.0))
    assert found == "utilization: Input should be less than or equal to 1, found 2.0"


def test_all_fields_are_named(module: dict[str, Any]) -> None:
    found = checked(module, lambda: module["VllmConfig"](utilization=0, seats=0))
    assert found == (
        "utilization: Input should be greater than 0, found 0; "
        "seats: Input should be greater than or equal to 1, found 0"
    )


def test_key_error_has_no_quotes(module: dict[str, Any]) -> None:
    error = raised(module["validate_api_server_args"], "nosuch")
    assert sentence_of(error) == "invalid tool call parser: nosuch"


def test_message_that_was_meant_for_a_logger(module: dict[str, Any]) -> None:
    found = checked(module, module["logged"], "File does not exist: %s", "/no/such")
    assert found == "File does not exist: /no/such"


def test_flags_that_do_not_go_together(module: dict[str, Any]) -> None:
    assert sentence_of(raised(module["cmd"], None)) == "--api-server-count=2 cannot be used with --headless"


def test_value_that_python_cannot_read_is_told_with_its_place(module: dict[str, Any]) -> None:
    found = checked(module, module["read"], "abc")
    assert found is not None
    assert re.fullmatch(r"invalid literal for int\(\) with base 10: 'abc' \(arg_utils.py:\d+\)", found)


def test_long_list_is_cut_between_words(module: dict[str, Any]) -> None:
    found = checked(module, module["refuse"], ValueError, "one of " + "word\x1b " * 500)
    assert found is not None
    assert len(found) < 410
    assert found.endswith("word ...")


def test_failed_start_is_none(module: dict[str, Any]) -> None:
    assert sentence_of(raised(module["cmd"], module["build_async_engine_client"])) is None


def test_mistake_in_a_program_is_none(module: dict[str, Any]) -> None:
    assert checked(module, module["slip"]) is None


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt, SystemExit, PairError])
def test_what_is_no_refusal_is_none(module: dict[str, Any], kind: type[BaseException]) -> None:
    assert checked(module, module["refuse"], kind, "text") is None


def test_same_names_elsewhere_are_none(module: dict[str, Any]) -> None:
    module["__name__"] = "somebody.else"
    assert checked(module, module["refuse"], ValueError, "text") is None


def test_error_that_was_never_raised_is_none() -> None:
    assert sentence_of(ValueError("text")) is None


@pytest.mark.parametrize("name", sorted(CHECKS | COMMANDS))
def test_function_is_vllms(vllm_code: str, name: str) -> None:
    assert f"def {name}(" in vllm_code


@pytest.fixture(scope="module")
def vllm_code() -> str:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    files = [root / "logger.py", root / "engine/arg_utils.py", *(root / "entrypoints").rglob("*.py")]
    return "\n".join(file.read_text() for file in files)


REFUSED: dict[str, tuple[list[str], str]] = {
    "heads": (
        ["--tensor-parallel-size", "2"],
        r"Total number of attention heads \(9\) must be divisible by .* \(2\)\.",
    ),
    "length": (["--max-model-len", "100000000"], r"User-specified max_model_len \(100000000\) is greater than .*"),
    "quantization": (["--quantization", "unknown"], r"Unknown quantization method: unknown\. Must be one of .*"),
    "not quantized": (["--quantization", "awq"], r"Cannot find the config file for awq"),
    "utilization": (
        ["--gpu-memory-utilization", "2"],
        r"gpu_memory_utilization: Input should be less than or equal to 1, found 2\.0",
    ),
    "method": (
        ["--speculative-config", '{"method": "nonsense", "num_speculative_tokens": 3}'],
        r"method: Input should be 'ngram', .*",
    ),
    "key": (
        ["--speculative-config", '{"metod": "ngram", "num_speculative_tokens": 3}'],
        r"metod: Unexpected keyword argument, found 'ngram'",
    ),
    "no tokens": (["--speculative-config", '{"method": "ngram"}'], r"num_speculative_tokens must be provided .*"),
    "draft": (
        ["--speculative-config", '{"method": "draft_model", "model": "/no/such", "num_speculative_tokens": 3}'],
        r"Invalid repository ID or local directory specified: '/no/such'\. Please verify .*",
    ),
    "tool parser": (
        ["--enable-auto-tool-choice", "--tool-call-parser", "nosuch"],
        r"invalid tool call parser: nosuch \(chose from .*",
    ),
    "no tool parser": (["--enable-auto-tool-choice"], r"--enable-auto-tool-choice requires --tool-call-parser"),
    "reasoning parser": (["--reasoning-parser", "nosuch"], r"Reasoning parser 'nosuch' not found\. .*"),
    "template": (["--chat-template", "/no/such.jinja"], r"The supplied chat template string \(/no/such\.jinja\) .*"),
    "tokenizer": (["--tokenizer", "/no/such"], r"Repo id must be in the form .*'/no/such'.*"),
    "override": (
        ["--hf-overrides", '{"num_hidden_layers": "x"}'],
        r"Validation error for field 'num_hidden_layers': TypeError: .*",
    ),
    "two fields": (
        ["--max-num-seqs", "0"],
        r"max_num_batched_tokens: Input .* 1, found 0; max_num_seqs: Input should be .* 1, found 0",
    ),
    "batch": (
        ["--max-num-batched-tokens", "10", "--max-num-seqs", "100"],
        r"max_num_batched_tokens \(10\) must be greater than or equal to max_num_seqs \(100\)\.",
    ),
    "backend": (["--attention-backend", "NOSUCH"], r"Unknown attention backend: 'NOSUCH'\. Valid options are: .*"),
    "executor": (["--distributed-executor-backend", "nosuch"], r"not enough values to unpack .* \(\w+\.py:\d+\)"),
    "ray": (["--distributed-executor-backend", "ray"], r"Failed to import Ray: .*"),
    "devices": (["--device-ids", "0,0"], r"--device-ids must not contain duplicates: \[0, 0\]"),
    "experts": (["--enable-expert-parallel"], r"Number of experts in the model must be greater than 0 .*"),
    "log": (
        ["--logging-config.pylogging_config_file", "/no/such"],
        r"Could not load logging config\. File does not exist: /no/such",
    ),
    "headless": (
        ["--headless", "--api-server-count", "2"],
        r"--api-server-count=2 cannot be used with --headless .*",
    ),
    "balancing": (
        ["--data-parallel-rank", "1", "--data-parallel-start-rank", "1"],
        r"Cannot use more than one data parallel load balancing mode\. .*",
    ),
    "keep-alive": (["--sse-keep-alive-interval", "-1"], r"--sse-keep-alive-interval must be a non-negative integer .*"),
    "offload": (["--cpu-offload-gb", "-1"], r"cpu_offload_gb: Input should be .* 0, found -1\.0"),
    "servers": (["--tensor-parallel-size", "2", "--api-server-count", "2"], r"Total number of attention heads .*"),
    "variable": (["VLLM_USE_V2_MODEL_RUNNER=abc"], r"VLLM_USE_V2_MODEL_RUNNER: invalid literal for int\(\) .*: 'abc'"),
}
"""Flags, or a variable; and what is said about them."""


@pytest.fixture(scope="module")
def answers(demo_pair: tuple[Path, Path]) -> dict[str, str]:
    """What is said about each case: one process answers all of them."""
    cases = []
    for given, _ in REFUSED.values():
        variables = dict(item.split("=") for item in given if item.startswith("VLLM_"))
        cases.append(([item for item in given if not item.startswith("VLLM_")], variables))
    base, aligned = (str(folder.resolve()) for folder in demo_pair)
    found = ask("tests.vllm_plugin.refusals", {"base": base, "aligned": aligned, "cases": cases})
    return dict(zip(REFUSED, found, strict=True))


@pytest.mark.engine
@pytest.mark.parametrize("case", REFUSED)
def test_real_refusal_is_one_sentence(answers: dict[str, str], case: str) -> None:
    assert re.fullmatch(REFUSED[case][1], answers[case]), json.dumps(answers[case])
    assert "validation error" not in answers[case]
    assert len(answers[case]) < 410


def test_a_number_of_ranks_that_changes_is_refused() -> None:
    """vLLM loads a rank that it adds later by its dummy format, which refuses our configuration."""
    refuse_elastic_experts(False)
    with pytest.raises(ConfigError, match="--enable-elastic-ep: ranks that vLLM adds later cannot load"):
        refuse_elastic_experts(True)
