"""Build a real vLLM model in this process, without an engine: a second or so once vLLM is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def vllm_model(path: Path | str, **engine_arguments: Any) -> Iterator[torch.nn.Module]:
    """Load ``path`` as a vLLM worker does and give the model; parallel state is one rank's."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    arguments = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 64, **engine_arguments}
    config = EngineArgs(model=str(path), **arguments).create_engine_config()
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            store = f"file:///tmp/expo-test-store-{os.getpid()}"
            init_distributed_environment(
                world_size=1, rank=0, distributed_init_method=store, local_rank=0, backend="gloo"
            )
        initialize_model_parallel(1, 1)  # anew for each model: its groups depend on the model
        empty_cache = torch.accelerator.empty_cache
        torch.accelerator.empty_cache = lambda: None  # raises on a machine without an accelerator
        try:
            yield get_model(vllm_config=config)
        finally:
            torch.accelerator.empty_cache = empty_cache
            destroy_model_parallel()


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, as raw bytes so that equality is equality of bits."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: tensor.detach().contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor
        for name, tensor in tensors.items()
    }
