"""What the server process makes of a request, before vLLM is imported."""

from __future__ import annotations

import json
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expo_serve.config import ExpoConfig, Pinned, Source
from expo_serve.errors import UsageError
from expo_serve.vllm_plugin import server
from expo_serve.vllm_plugin.plain_vllm import refuse_other_front_ends

KNOWN = {"--enable-prefix-caching", "--no-enable-prefix-caching", "--port"}


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"port": 8001}, ["--port", "8001"]),
        ({"enforce-eager": True, "enable_prefix_caching": False}, ["--enforce-eager", "--no-enable-prefix-caching"]),
        ({"no-such-switch": False, "middleware": []}, []),
        ({"served-model-name": ["a", "b"]}, ["--served-model-name", "a", "b"]),
        ({"compilation-config": {"mode": 2}}, ["--compilation-config", '{"mode": 2}']),
    ],
)
def test_keys_of_a_file_become_flags(options: dict[str, object], flags: list[str]) -> None:
    assert server.flatten(options, KNOWN) == flags


def test_our_flags_carry_the_pinned_sources() -> None:
    pinned = Pinned(base=Source(name="b", path="/m/b"), aligned=Source(name="a", path="/m/a", revision="c0ffee"))
    config = ExpoConfig(base="b", aligned="a", alpha=0.5, alpha_rules=("lm_head=0",), pinned=pinned)  # type: ignore[arg-type]
    flags = server.our_arguments(config, "a-expo-0.5")
    assert flags[0] == "/m/a"
    extra = json.loads(flags[flags.index("--model-loader-extra-config") + 1])
    assert ExpoConfig.model_validate(extra) == config
    assert flags[1:3] == ["--served-model-name", "a-expo-0.5"]
    assert "--served-model-name" not in server.our_arguments(config, None)


def request(*arguments: str) -> dict[str, Any]:
    """What the command asks of the server process, with these flags of vLLM."""
    pinned = Pinned(base=Source(name="b", path="/m/b"), aligned=Source(name="a", path="/m/a"))
    config = ExpoConfig(base="b", aligned="a", alpha=0.5, pinned=pinned)
    given = {"config": config.model_dump(mode="json"), "arguments": list(arguments), "file_options": {}}
    return {**given, "served_model_name": "a-expo-0.5", "status_fd": -1}


@pytest.mark.engine
def test_flags_of_vllm_are_understood_beside_ours() -> None:
    _, args = server.parse(request("--max-model-len", "64"))
    assert (args.model, args.load_format, args.max_model_len) == ("/m/a", "expo", 64)
    assert args.served_model_name == ["a-expo-0.5"]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-such-flag", "1"], "^unrecognized arguments: --no-such-flag 1$"),
        (["--max-model-len", "many"], "^argument --max-model-len: .*many"),
    ],
)
def test_a_wrong_flag_of_vllm_is_an_error_of_ours(flags: list[str], words: str) -> None:
    """Which the status port can show."""
    with pytest.raises(UsageError, match=words):
        server.parse(request(*flags))


@pytest.mark.engine
@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        (["--tensor-parallel-size", "2", "--pipeline-parallel-size", "4", "--nnodes", "2"], 4),
        (["--tensor-parallel-size", "2", "--data-parallel-size", "4", "--nnodes", "2"], 4),
        (["--data-parallel-size", "4", "--data-parallel-size-local", "2", "--data-parallel-start-rank", "2"], 2),
        ([], 1),
    ],
)
def test_ranks_of_a_machine_without_a_port(flags: list[str], ranks: int) -> None:
    assert server.ranks_here(server.parse(request(*flags, "--headless"))[1]) == ranks


@pytest.mark.engine
@pytest.mark.parametrize(
    "flags", [["--grpc"], ["--grpc-port", "5000"], ["--data-parallel-multi-port-external-lb"], ["--api-server-count=1"]]
)
def test_front_ends_that_go_around_ours_are_refused(flags: list[str]) -> None:
    _, args = server.parse(request(*flags))
    if "api" in flags[0]:
        refuse_other_front_ends(args)
        return
    with pytest.raises(UsageError, match=f"^{flags[0]}: .*; leave it out$"):
        refuse_other_front_ends(args)


@pytest.mark.engine
def test_an_abbreviated_flag_of_ours_to_set_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^--load-format is set by expo-serve"):
        server.parse(request("--load-form", "dummy"))


@pytest.mark.engine
@pytest.mark.parametrize("flags", [["--api-key", ""], ["--api_ke="], ["--api-key", "good", "None"]])
def test_empty_key_is_refused_as_vllm_has_parsed_it(flags: list[str]) -> None:
    with pytest.raises(UsageError, match=r"^--api-key is empty"):
        server.parse(request(*flags))


@pytest.mark.engine
def test_empty_variable_is_refused_unless_there_is_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "")
    with pytest.raises(UsageError, match=r"^VLLM_API_KEY is empty"):
        server.parse(request())
    assert server.parse(request("--api-key", "good"))[1].api_key == ["good"]


def test_plugins_that_vllm_may_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    server.allow_plugins()
    assert "expo" in os.environ["VLLM_PLUGINS"].split(",")
    assert "lora_filesystem_resolver" in os.environ["VLLM_PLUGINS"].split(",")  # vLLM's own, loaded by default
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    server.allow_plugins()
    assert os.environ["VLLM_PLUGINS"] == "expo,mine"


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Puts a shell script in the place of the compiler; lscpu, which vLLM calls too, is there on every machine."""

    def write(name: str, text: str) -> Path:
        script = tmp_path / name
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
        return script

    def use(text: str) -> Path:
        monkeypatch.setenv("CXX", str(write("compiler", text)))
        return tmp_path / "compiler"

    write("lscpu", "exit 0")
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{tmp_path}")
    return use


@pytest.mark.parametrize("code", [0, 1])
def test_a_compiler_is_tried(compiler: Callable[[str], Path], code: int) -> None:
    script = compiler(f"exit {code}")
    expected = f"the C++ compiler ({script}) does not work" if code else None
    assert server.compiler_problem() == expected


def test_headers_of_python_are_looked_for(
    compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """vLLM's compiled code includes them; without, it fails after minutes. The compiler is told where they are."""
    compiler('for given; do test -e "${given#-I}/Python.h" && exit 0; done; echo "no Python.h" >&2; exit 1')
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert server.compiler_problem() == "no headers of Python (Python.h)"
    (tmp_path / "Python.h").touch()
    assert server.compiler_problem() is None


def test_the_machines_own_compiler(compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed here, the answer is the right one."""
    monkeypatch.delenv("CXX", raising=False)
    expected = None if Path(sysconfig.get_path("include"), "Python.h").exists() else "no headers of Python (Python.h)"
    assert server.compiler_problem() == (expected if shutil.which("g++") else "no C++ compiler (g++)")
