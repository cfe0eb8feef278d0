"""Every command and flag that the pages show is one that exists."""

from __future__ import annotations

import ast
import json
import re
import shlex

import pytest
import yaml

from expo_serve.checkpoint.published import find_pair
from expo_serve.cli.options import add_source_flags, read_options
from expo_serve.cli.parser import Parser
from expo_serve.config import parse_config
from loadtests.device_check import __main__ as device_check
from tests.deploy.chart import refusal, render
from tests.deploy.gpu_kit import kit
from tests.docs.cli_page import COMMANDS, flags_of
from tests.docs.pages import ALL, README, ROOT, Page, page

VLLM_FLAGS = {
    "--api-key", "--chat-template", "--compilation-config", "--data-parallel-size", "--default-chat-template-kwargs",
    "--distributed-executor-backend", "--data-parallel-multi-port-external-lb", "--grpc", "--grpc-port", "--host",
    "--uds",
    "--enable-ep-weight-filter", "--enable-expert-parallel", "--enable-lora", "--enforce-eager", "--headless",
    "--hf-overrides", "--language-model-only", "--load-format", "--master-addr", "--max-lora-rank", "--max-loras",
    "--max-model-len", "--mm-encoder-only", "--model", "--model-impl", "--model-loader-extra-config", "--nnodes",
    "--no-use-tqdm-on-load", "--node-rank", "--pipeline-parallel-size", "--port", "--quantization",
    "--served-model-name", "--shutdown-timeout", "--skip-tokenizer-init", "--speculative-config",
    "--tensor-parallel-size", "--tokenizer",
    "--trust-remote-code", "--dtype", "--worker-extension-cls",
}  # fmt: skip
"""Flags of vLLM that the pages show; the real parser knows all of them (a test)."""
OTHER_FLAGS = {"--no-deps", "--device", "--help"}
"""Flags of other programs that prose mentions."""
SCRIPT_FLAGS = {
    "loadtests.device_check": set(device_check.parser()._option_string_actions),
    "deploy/gpu/kit.py": set(kit.parser()._option_string_actions),
}
"""Flags of our own scripts, by module or file."""
SET_BY_EXPO = {"--model", "--load-format", "--model-loader-extra-config", "--worker-extension-cls"}
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def flags_in(words: list[str]) -> set[str]:
    """The flags among words, without their values."""
    return {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}


def problems(command: str) -> list[str]:
    """What is wrong with a command line."""
    words = shlex.split(command)
    match words:
        case ["expo-serve", "delta", action, *rest]:
            return sorted(flags_in(rest) - flags_of(f"delta {action}"))
        case ["expo-serve", "sweep", *rest]:
            return sorted(flags_in(rest) - flags_of("sweep") - (VLLM_FLAGS - SET_BY_EXPO))
        case ["expo-serve", name, *rest] if name in COMMANDS:
            return sorted(flags_in(rest) - flags_of(name))
        case ["expo-serve", *rest]:
            wrong = flags_in(rest) - flags_of("") - (VLLM_FLAGS - SET_BY_EXPO)
            return [*sorted(wrong), *(word for word in rest[:1] if not word.startswith("-"))]
        case ["vllm", "serve", model, *rest]:
            return [*sorted(flags_in(rest) - VLLM_FLAGS), *([model] if model.startswith("-") else [])]
        case ["make", target, *_]:
            return [] if target in TARGETS else [target]
        case ["python" | "python3", "-m", module, *rest]:
            path = ROOT / module.replace(".", "/")
            is_there = path.with_suffix(".py").exists() or (path / "__main__.py").exists()
            return sorted(flags_in(rest) - SCRIPT_FLAGS.get(module, flags_in(rest))) if is_there else [module]
        case ["python3", file, *rest] if file in SCRIPT_FLAGS:
            return sorted(flags_in(rest) - SCRIPT_FLAGS[file])
        case ["helm" | "pip", *_]:
            return []
    return [command]


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_commands_in_code_blocks_exist(one: Page) -> None:
    assert [(command, wrong) for command in one.commands if (wrong := problems(command))] == []


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_commands_and_flags_in_prose_exist(one: Page) -> None:
    ours = set().union(*(flags_of(command) for command in COMMANDS))
    scripts = set().union(*SCRIPT_FLAGS.values()) if one.name == "docs/gpu.md" else set()
    for span in one.spans:
        if re.match(r"--[a-z]", span):
            assert not flags_in(shlex.split(span)) - ours - VLLM_FLAGS - OTHER_FLAGS - scripts, span
        if re.match(r"(make|python -m) \w", span):
            assert not problems(span), span


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("expo-serve --base B --alined A --alpha 0.5", ["--alined"]),
        ("expo-serve --base B --aligned A --alpha 0.5 --load-format expo", ["--load-format"]),
        ("expo-serve serve --base B", ["serve"]),
        ("expo-serve inspect --base B --port 8000", ["--port"]),
        ("expo-serve delta verify --base B --no-such", ["--no-such"]),
        ("vllm serve A --no-such", ["--no-such"]),
        ("make dmeo", ["dmeo"]),
        ("python -m loadtests.no_such", ["loadtests.no_such"]),
        ("python -m loadtests.device_check --no-such", ["--no-such"]),
        ("python3 deploy/gpu/kit.py --no-such", ["--no-such"]),
        ("expo_serve --base B", ["expo_serve --base B"]),
    ],
)
def test_a_wrong_command_is_found(command: str, wrong: list[str]) -> None:
    assert problems(command) == wrong


def test_pages_show_every_command() -> None:
    shown = {command for one in ALL for command in one.commands}
    for name in COMMANDS:
        if name != "delta":
            assert any(command.startswith(f"expo-serve {name}".strip()) for command in shown), name
    for command in ("make demo", "make test", "make setup"):
        assert command in set(README.commands)


def test_sources_of_the_shown_servers_are_accepted() -> None:
    """Read by the parser of the command, which validates alpha, rules and which sources go together."""
    for one in ALL:
        for command in one.commands:
            words = shlex.split(command)
            if words[0] == "expo-serve" and len(words) > 1 and words[1].startswith("-") and "--config" not in words:
                parser = Parser(prog="expo-serve")
                add_source_flags(parser)
                assert read_options(parser, words[1:]).config.base == base_of(words)


def base_of(words: list[str]) -> str:
    """What a command line of the server says base is."""
    if "--pair" in words:
        return find_pair(words[words.index("--pair") + 1], "page").base
    return words[words.index("--base") + 1]


def test_extra_configs_are_accepted() -> None:
    shown = [
        json.loads(words[words.index("--model-loader-extra-config") + 1])
        for one in ALL
        for words in map(shlex.split, one.commands)
        if "--model-loader-extra-config" in words
    ]
    assert len(shown) >= 3
    for extra in shown:
        assert parse_config(extra, "page").alpha == 0.5


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_python_is_python(one: Page) -> None:
    for code in one.code("python"):
        ast.parse(code)


def test_configuration_file_is_accepted() -> None:
    (block,) = (block for block in page("getting-started.md").code("yaml") if "alpha-rule" in block)
    ours = {key.replace("-", "_"): value for key, value in yaml.safe_load(block).items() if f"--{key}" in flags_of("")}
    ours["alpha_rules"] = ours.pop("alpha_rule")
    assert parse_config(ours, "page").alpha_for("lm_head.weight") == 0


def test_chart_values_are_accepted() -> None:
    """Rendered by Helm, which checks the schema."""
    shown = [yaml.safe_load(block) for one in (README, page("kubernetes.md")) for block in one.code("yaml")]
    assert len(shown) == 2
    for values in shown:
        deployments = [one["metadata"]["name"] for one in render(values) if one["kind"] == "Deployment"]
        assert sorted(deployments) == ["demo-expo-serve-mild", "demo-expo-serve-strong"]
    assert "varients" in refusal({**shown[0], "varients": {}})


@pytest.mark.engine
def test_vllm_has_the_flags() -> None:
    from expo_serve.vllm_plugin import compat

    serve = compat.ServeSubcommand().subparser_init(
        compat.FlexibleArgumentParser(prog="vllm").add_subparsers(dest="subparser")
    )
    assert not VLLM_FLAGS - set(serve._option_string_actions)
