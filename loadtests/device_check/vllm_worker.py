"""A vLLM worker's state in this process, without an engine, on a GPU or on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from loadtests.device_check.outcome import Skipped
from loadtests.device_check.setting import Setting

ALPHA = 0.5
# What two ranks on one card cannot have, and what a load does not need: gloo carries all that they say to each other.
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_DISABLE_PYNCCL": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # an engine in this process finds the load format that was registered here
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Rank:
    """Which of how many processes this is."""

    number: int = 0
    of: int = 1
    store: Path | None = None
    """A file by which they find each other."""


def prepare(setting: Setting) -> None:
    """Set what vLLM reads when it is imported, and register the load format as its entry point would.

    Raises:
        Skipped: vLLM is not there, or cannot be imported, or has no platform of this kind.
    """
    if find_spec("vllm") is None:
        raise Skipped("vLLM is not installed, and no kit is on PYTHONPATH (docs/gpu.md)")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm.platforms import current_platform

    if setting.is_cuda != current_platform.is_cuda_alike():
        raise Skipped(f"this vLLM works on {current_platform.device_name or 'no device'}, not on {setting.device}")
    import expo_serve.vllm_plugin

    expo_serve.vllm_plugin.register()


def engine_arguments(setting: Setting) -> dict[str, Any]:
    """What every engine here is given: the kit has no attention kernels but Triton's."""
    arguments: dict[str, Any] = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 64}
    return {**arguments, "attention_backend": "TRITON_ATTN"} if setting.is_cuda else arguments


def expo_arguments(base: Path) -> dict[str, Any]:
    """The load format of plain vLLM's, with the aligned checkpoint as the model."""
    return {"load_format": "expo", "model_loader_extra_config": {"base": str(base), "alpha": ALPHA}}


@contextmanager
def worker(setting: Setting, model: Path, rank: Rank, **arguments: Any) -> Iterator[Any]:
    """The state that a worker has before it builds a model; gives vLLM's configuration."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import destroy_model_parallel, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs

    everything = {**engine_arguments(setting), **arguments}
    config = EngineArgs(model=str(model), **everything).create_engine_config()
    config.parallel_config.rank = rank.number
    with ExitStack() as stack:
        stack.enter_context(set_current_vllm_config(config))
        if not setting.is_cuda:  # vLLM empties its cache after a load; the CPU has none and raises
            stack.enter_context(mock.patch.object(torch.accelerator, "empty_cache"))
        _join(setting, rank)
        initialize_model_parallel(config.parallel_config.tensor_parallel_size)
        stack.callback(destroy_model_parallel)
        yield config


def card_of(setting: Setting, rank: Rank) -> int:
    """Each rank has a card of its own where there are enough."""
    return rank.number if setting.is_cuda and torch.cuda.device_count() >= rank.of else 0


def _join(setting: Setting, rank: Rank) -> None:
    from vllm.distributed import init_distributed_environment
    from vllm.distributed.parallel_state import set_custom_all_reduce

    if torch.distributed.is_initialized():
        return
    card = card_of(setting, rank)
    if setting.is_cuda:
        torch.cuda.set_device(card)
        set_custom_all_reduce(False)
    init_distributed_environment(
        world_size=rank.of,
        rank=rank.number,
        distributed_init_method=f"file://{rank.store or setting.work / f'store-{os.getpid()}'}",
        local_rank=card if setting.is_cuda else rank.number,
        backend="gloo",
    )
