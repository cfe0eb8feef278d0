"""One load inside vLLM, in this process, without an engine: who loads, and what it cost."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from expo_serve import memory
from expo_serve.config import ExpoConfig
from loadtests.pairs import Pair
from loadtests.results import ALPHA
from tests.inprocess import worker_config

# Before vLLM is imported: what it says about a machine without a GPU at every start is not what is measured here.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
_IO = Path("/proc/self/io")


@dataclass(frozen=True)
class Contender:
    """A way to fill a model: vLLM's load format, with a number of torch threads."""

    load_format: str
    threads: int = 1


CONTENDERS = {
    "plain": Contender("auto"),
    "plain2": Contender("auto", threads=2),
    # Its own writes go on in threads of its own; torch has one, as in vLLM's CPU worker.
    "expo": Contender("expo"),
    "runai": Contender("runai_streamer"),
}
# Formats for GPUs, asked once what they say on CPU.
GPU_CONTENDERS = {"fastsafetensors": Contender("fastsafetensors"), "instanttensor": Contender("instanttensor")}


def contenders() -> tuple[list[str], dict[str, str]]:
    """Who can take part, and why who cannot."""
    missing = [name for name in ("runai_model_streamer", "humanize") if find_spec(name) is None]
    skipped = {"runai": f"not installed: {', '.join(missing)}"} if missing else {}
    return [name for name in CONTENDERS if name not in skipped], skipped


@contextmanager
def empty_model(path: Path, **arguments: Any) -> Iterator[tuple[torch.nn.Module, Any]]:
    """A model of vLLM whose parameters were allocated and not touched, and vLLM's configuration."""
    with worker_config(path, **arguments) as config:
        # Imported here: worker_config sets the environment that vLLM reads on its first import.
        from vllm.model_executor.model_loader import get_model_loader
        from vllm.utils.torch_utils import set_default_torch_dtype

        with set_default_torch_dtype(config.model_config.dtype):
            loader = get_model_loader(config.load_config)
            yield loader.create_model(vllm_config=config, model_config=config.model_config), config


def weight_bytes(model: torch.nn.Module) -> int:
    """Size of the parameters, shared ones counted once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def load_once(
    model: torch.nn.Module, config: Any, contender: Contender, pair: Pair, sources: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Fill the model once.

    Args:
        model: its parameters are written over.
        config: vLLM's.
        contender: who loads.
        pair: what expo loads, unless ``sources`` says otherwise.
        sources: an :class:`ExpoConfig` with pinned sources, as the command gives it to the workers.

    Returns:
        seconds, what the memory did, and the bytes read: ``rchar`` counts those that were asked of the kernel by read
        calls (not those that came through a mapping), the report's what expo says it asked of storage.
    """
    from vllm.model_executor.model_loader import get_model_loader

    extra = sources or {"base": str(pair.base), "alpha": ALPHA} if contender.load_format == "expo" else {}
    model_config = config.model_config
    if sources:
        model_config = copy(model_config)
        pinned = ExpoConfig.model_validate(sources).pinned
        assert pinned is not None
        model_config.model = pinned.deployed.path
    load_config = replace(
        config.load_config,
        load_format=contender.load_format,
        model_loader_extra_config=extra,
        use_tqdm_on_load=False,
    )
    torch.set_num_threads(contender.threads)
    memory.reset_peak()
    anonymous, asked = memory.anonymous_bytes(), _read_characters()
    started = time.perf_counter()
    get_model_loader(load_config).load_weights(model, model_config)
    return {
        "seconds": time.perf_counter() - started,
        "peak_resident_bytes": memory.peak_resident_bytes(),
        "anonymous_growth_bytes": memory.anonymous_bytes() - anonymous,
        "rchar_bytes": _read_characters() - asked,
        **(_reported(model) if contender.load_format == "expo" else {}),
    }


def _reported(model: Any) -> dict[str, Any]:
    report = model.expo_load_report
    return {"report_read_bytes": report.read_bytes, "phase_seconds": report.phase_seconds}


def _read_characters() -> int:
    """All bytes that this process was given by read calls until now."""
    return int(_IO.read_text().split("rchar: ")[1].split()[0])
