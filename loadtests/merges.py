"""The two ways that people write an extrapolated checkpoint today: mergekit, and the ExPO authors' algorithm.

python -m loadtests.merges BASE ALIGNED ALPHA OUT      the authors' algorithm, as a command of its own
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from loadtests.pairs import Pair
from loadtests.servers import run_watched

MERGEKIT = "mergekit==0.1.5"
_TORCH = "torch==2.13.0+cpu"
_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

Merge = Callable[[Pair, float, Path], dict[str, Any]]
"""Write the pair's extrapolation by alpha into a folder: seconds, peak resident size, bytes written."""


def mergekit(work: Path) -> Merge:
    """mergekit's task arithmetic in fp32, in an environment of its own (it pins other packages)."""
    environment = _environment(work / "mergekit-venv")

    def merge(pair: Pair, alpha: float, out: Path) -> dict[str, Any]:
        recipe = out.with_suffix(".yaml")
        recipe.write_text(yaml.safe_dump(_recipe(pair, alpha)))
        return _merged([str(environment / "bin/mergekit-yaml"), str(recipe), str(out), "--quiet"], out)

    return merge


def authors(pair: Pair, alpha: float, out: Path) -> dict[str, Any]:
    """The authors' algorithm in a process of its own."""
    command = [sys.executable, "-m", "loadtests.merges", str(pair.base), str(pair.aligned), str(alpha), str(out)]
    return _merged(command, out)


def installed(work: Path) -> list[str]:
    """What mergekit's environment holds, as pip lists it."""
    python = work / "mergekit-venv" / "bin/python"
    command = [str(python), "-m", "pip", "list", "--format", "freeze", "--disable-pip-version-check"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if line.split("==")[0] in ("mergekit", "torch", "transformers", "safetensors")]


def _merged(command: list[str], out: Path) -> dict[str, Any]:
    figures = run_watched(command, out.with_suffix(".log"))
    return {**figures, "written_bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file())}


def _recipe(pair: Pair, alpha: float) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(pair.base.resolve()),
        "models": [{"model": str(pair.aligned.resolve()), "parameters": {"weight": 1 + alpha}}],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def _environment(folder: Path) -> Path:
    """Make mergekit's environment once."""
    ready = folder / ".ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(folder / "bin/python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        # As the Makefile does it: torch's CPU build from a folder that pip knows of, else from PyTorch's index.
        if subprocess.run([*pip, _TORCH], capture_output=True, check=False).returncode:
            subprocess.run([*pip, "--index-url", _TORCH_INDEX, _TORCH], check=True)
        subprocess.run([*pip, MERGEKIT], check=True)
        ready.touch()
    return folder


def _authors_algorithm(base: str, aligned: str, alpha: float, out: str) -> None:
    """Both models whole in memory, three operations in bf16 for each parameter, and a new checkpoint."""
    before = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    after = transformers.AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.bfloat16)
    others = dict(before.named_parameters())
    with torch.no_grad():
        for name, parameter in after.named_parameters():
            parameter.copy_(parameter + alpha * (parameter - others[name]))
    after.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(aligned).save_pretrained(out)


if __name__ == "__main__":
    _authors_algorithm(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4])
