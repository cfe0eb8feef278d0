"""Help and mistakes answer at once, since nothing heavy is imported for them.

How long they take is measured by ``python -m loadtests.answers``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.raw import tiny_tensors, write_pair, write_raw

HEAVY = {"torch", "vllm", "transformers", "numpy", "safetensors"}

QUICK: dict[str, tuple[list[str], int]] = {
    "help": (["--help"], 0),
    "help of delta": (["delta", "--help"], 0),
    "version": (["--version"], 0),
    "help of inspect": (["inspect", "--help"], 0),
    "help of merge": (["merge", "--help"], 0),
    "nothing": ([], 2),
    "bad alpha": (["--base", "b", "--aligned", "a", "--alpha", "0,5"], 2),
    "aligned missing": (["--base", "b", "--alpha", "1"], 2),
    "ours to set": (["--base", "b", "--aligned", "a", "--alpha", "1", "--load-format", "dummy"], 2),
    "bad rule": (["--base", "b", "--aligned", "a", "--alpha", "1", "--alpha-rule", "(=1"], 2),
    "bad flag of merge": (["merge", "--base", "b", "--aligned", "a", "--alpha", "1"], 2),
    "probe of nobody": (["probe", "--url", "http://127.0.0.1:9", "--alpha", "1"], 1),
    "unknown flag of inspect": (["inspect", "--base", "b", "--aligned", "a", "--alpha", "1", "--port", "1"], 2),
}


def imported(*arguments: str) -> tuple[int, set[str]]:
    """The exit code of the command, and the packages that it imported."""
    command = [sys.executable, "-X", "importtime", "-m", "expo_serve", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return result.returncode, {line.rpartition("|")[2].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize(("arguments", "code"), QUICK.values(), ids=QUICK)
def test_answer_imports_nothing_heavy(arguments: list[str], code: int) -> None:
    found = imported(*arguments)
    assert found[0] == code
    assert "expo_serve" in found[1]
    assert not found[1] & HEAVY


@pytest.mark.parametrize("command", [[], ["inspect"], ["merge"]])
def test_refused_pair_imports_neither_torch_nor_vllm(tmp_path: Path, command: list[str]) -> None:
    base, _ = write_pair(tmp_path)
    other = write_raw(tmp_path / "other", tiny_tensors(layers=3))
    out = ["--out", str(tmp_path / "out")] if command == ["merge"] else []
    code, packages = imported(*command, "--base", str(base), "--aligned", str(other), "--alpha", "1", *out)
    assert code == 2
    assert not packages & {"torch", "vllm"}


def test_good_pair_is_inspected_without_torch(tmp_path: Path) -> None:
    base, aligned = write_pair(tmp_path)
    code, packages = imported("inspect", "--base", str(base), "--aligned", str(aligned), "--alpha", "1")
    assert code == 0
    assert "pydantic" in packages, "imports are not seen"
    assert not packages & {"torch", "vllm"}
