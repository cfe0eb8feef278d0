"""Which card, driver and packages the figures come from."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from typing import Any

import torch

from expo_serve import kernels
from expo_serve.load.device_low_rank import has_the_rules_bits
from expo_serve.load.formula import fuses_addition
from loadtests.device_check import stage
from loadtests.device_check.cases import PEERS
from loadtests.device_check.setting import Setting

_ASKED = "name,driver_version,pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current,memory.total"
_OPTIONAL = ("triton", "vllm", "zstandard", "numba", *PEERS)


def run(setting: Setting) -> dict[str, Any]:
    """Facts, no check."""
    return {
        "way": "the device's stage" if setting.is_cuda else "the host's way: a CPU has no stage",
        "cards": _cards() if setting.is_cuda else [],
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "nvidia_smi": _nvidia_smi(),
        "compiled_loops": kernels.available("bf16.combine"),
        "lora_on_the_device": setting.is_cuda and has_the_rules_bits(setting.device),
        "fuses_addition": setting.is_cuda and fuses_addition(setting.device),
        "stage": stage.USUAL.described(),
        "installed": [name for name in _OPTIONAL if find_spec(name)],
    }


def _cards() -> list[dict[str, Any]]:
    found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [
        {"name": card.name, "memory": card.total_memory, "capability": f"{card.major}.{card.minor}"} for card in found
    ]


def _nvidia_smi() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.splitlines()
