"""Everything that runs before a load works without torch and vLLM: imports, headers, plans and ``inspect``.

Under the Python of ``.venv`` both are hidden; the other Pythons (``make test-pythons``) do not have them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest

import expo_serve
from expo_serve.checkpoint.folder import open_checkpoint
from expo_serve.config import ExpoConfig, Source
from expo_serve.errors import CheckpointError, PairError
from expo_serve.plan.pair import plan_pair

ROOT = Path(__file__).parents[2]
PACKAGE = Path(expo_serve.__file__).parent
ROOMS = ("checkpoint", "plan", "cli")
ALONE = ("config", "errors", "report", "metrics", "memory", "progress")
FOLDERS = ("expo_serve", "tests", "deploy", "loadtests", "requirements")
HIDE = "import sys; sys.modules.update(dict.fromkeys(('torch', 'vllm', 'transformers', 'safetensors'))); "
WIDTHS = {"BF16": 2, "F32": 4, "I64": 8}
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4, "vocab_size": 8}
EMBED, NORM, IDS = "model.embed_tokens.weight", "model.norm.weight", "model.positions"
TENSORS = {EMBED: ("BF16", (8, 4)), NORM: ("BF16", (4,)), IDS: ("I64", (3,))}
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


def write(folder: Path, tensors: Tensors = TENSORS, cut: int = 0) -> Path:
    """Write a checkpoint of zeros, from the bytes of its header on; ``cut`` bytes are missing at its end."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + WIDTHS[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes((len(raw).to_bytes(8, "little") + raw + bytes(end))[: -cut or None])
    return folder


def hidden(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that can import neither torch nor vLLM, where a warning is an error."""
    command = [sys.executable, "-W", "error", "-c", HIDE + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)


def inspect(*sources: str) -> subprocess.CompletedProcess[str]:
    """Run ``expo-serve inspect --json`` without torch."""
    arguments = ["inspect", *sources, "--alpha", "0.5", "--json"]
    return hidden(f"from expo_serve.cli.main import main; sys.exit(main({arguments!r}))")


def test_rooms_before_the_load_are_imported() -> None:
    files = [file for room in ROOMS for file in (PACKAGE / room).glob("*.py") if file.name != "__init__.py"]
    modules = [f"expo_serve.{file.parent.name}.{file.stem}" for file in files]
    assert len(modules) > len(ROOMS)
    result = hidden(f"import {', '.join(modules + [f'expo_serve.{name}' for name in ALONE])}")
    assert (result.returncode, result.stderr) == (0, "")


def test_what_is_hidden_cannot_be_imported() -> None:
    assert "torch" in hidden("import expo_serve.load.lazy").stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_sources_compile_without_a_warning(folder: str) -> None:
    """Each version of Python warns of more: invalid escapes since 3.12, for example."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for file in files:
            compile(file.read_text(), str(file), "exec")


@pytest.fixture
def config() -> ExpoConfig:
    return ExpoConfig(base="base", aligned="aligned", alpha=0.5)


def plan(base: Path, aligned: Path, config: ExpoConfig) -> dict[str, bool]:
    """Plan a pair: the names of the result, and whether each is computed from both sides."""
    before = open_checkpoint("base", Source(name=base.name, path=str(base)))
    after = open_checkpoint("aligned", Source(name=aligned.name, path=str(aligned)))
    return {tensor.name: tensor.base is not None for tensor in plan_pair(before, after, config).tensors.values()}


def test_pair_is_planned(tmp_path: Path, config: ExpoConfig) -> None:
    planned = plan(write(tmp_path / "base"), write(tmp_path / "aligned"), config)
    assert planned == {EMBED: True, NORM: True, IDS: False}


@pytest.mark.parametrize(
    "tensors",
    [
        {name: one for name, one in TENSORS.items() if name != NORM},
        {**TENSORS, NORM: ("BF16", (5,))},
    ],
    ids=["missing", "shape"],
)
def test_pair_that_does_not_match_is_refused(tmp_path: Path, config: ExpoConfig, tensors: Tensors) -> None:
    base, aligned = write(tmp_path / "base", tensors), write(tmp_path / "aligned")
    with pytest.raises(PairError) as refusal:
        plan(base, aligned, config)
    assert NORM in "\n".join((str(refusal.value), *refusal.value.details))


@pytest.mark.parametrize("cut", [1, 88, 300])
def test_cut_file_is_refused(tmp_path: Path, cut: int) -> None:
    folder = write(tmp_path / "base", cut=cut)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint("base", Source(name="base", path=str(folder)))


def test_pair_is_inspected(tmp_path: Path) -> None:
    base, aligned = write(tmp_path / "base"), write(tmp_path / "aligned")
    result = inspect("--base", str(base), "--aligned", str(aligned))
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert {tensor["name"]: tensor["kind"] for tensor in found["tensors"]} == {
        EMBED: "extrapolated",
        NORM: "extrapolated",
        IDS: "copied",
    }
    assert found["refusals"] == []


def test_adapter_is_inspected(tmp_path: Path) -> None:
    layer = "model.layers.0.self_attn.q_proj"
    base = write(tmp_path / "base", {**TENSORS, f"{layer}.weight": ("BF16", (4, 4))})
    factors = {"lora_A.weight": ("F32", (2, 4)), "lora_B.weight": ("F32", (4, 2))}
    adapter = write(tmp_path / "adapter", {f"base_model.model.{layer}.{name}": one for name, one in factors.items()})
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "config.json").unlink()
    result = inspect("--base", str(base), "--delta", str(adapter))
    assert (result.returncode, result.stderr) == (0, "")
    kinds = {tensor["name"]: tensor["kind"] for tensor in json.loads(result.stdout)["tensors"]}
    assert kinds == {EMBED: "copied", NORM: "copied", IDS: "copied", f"{layer}.weight": "extrapolated"}


def test_refusal_has_its_exit_code(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {**TENSORS, EMBED: ("BF16", (8, 5))})
    result = inspect("--base", str(base), "--aligned", str(write(tmp_path / "aligned")))
    assert result.returncode == 2
    assert json.loads(result.stdout)["refusals"]
