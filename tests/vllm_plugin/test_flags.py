"""What the server process makes of a request, before vLLM is imported."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from expo_serve.config import ExpoConfig, Pinned, Source
from expo_serve.vllm_plugin import server

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


def test_plugins_that_vllm_may_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    server.allow_plugins()
    assert "expo" in os.environ["VLLM_PLUGINS"].split(",")
    assert "lora_filesystem_resolver" in os.environ["VLLM_PLUGINS"].split(",")  # vLLM's own, loaded by default
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    server.allow_plugins()
    assert os.environ["VLLM_PLUGINS"] == "expo,mine"


@pytest.mark.parametrize("code", [0, 1])
def test_a_compiler_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\nexit {code}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    expected = f"the C++ compiler ({compiler}) does not work" if code else None
    assert server.compiler_problem() == expected


def test_headers_of_python_are_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """vLLM's compiled code includes them; without, it fails after minutes."""
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file or directory' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert server.compiler_problem() == "no headers of Python (Python.h)"
    monkeypatch.delenv("CXX")
    if shutil.which("g++") and shutil.which("lscpu"):
        assert server.compiler_problem() is None
        monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
        assert server.compiler_problem() == "no headers of Python (Python.h)"
