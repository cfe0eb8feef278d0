"""Build a real vLLM model in this process, without an engine: a second or so once vLLM is imported."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def vllm_model(path: Path | str, role: str = "target", **arguments: Any) -> Iterator[torch.nn.Module]:
    """Load ``path`` as a vLLM worker does and give the model.

    Args:
        path: the checkpoint.
        role: with ``draft`` it is the draft model of the given ``speculative_config`` that is loaded.
        arguments: as for :func:`worker_config`.
    """
    from vllm.model_executor.model_loader import get_model

    with worker_config(path, **arguments) as config, loaded_state_kept():
        draft = config.speculative_config.draft_model_config if role == "draft" else None
        yield get_model(vllm_config=config, model_config=draft, load_config=config.load_config)


@contextmanager
def loaded_state_kept() -> Iterator[None]:
    """Models that are loaded meanwhile keep a copy of what was loaded, for :func:`state_of`.

    Right after loading vLLM packs most matrices for the CPU's kernels and leaves an empty parameter behind: whoever
    compares the finished models compares little more than their norms.
    """
    from vllm.model_executor.model_loader import base_loader

    process = base_loader.process_weights_after_loading

    def keep_and_process(model: torch.nn.Module, *arguments: Any) -> None:
        model.loaded_state = {name: raw.clone() for name, raw in _raw_state(model).items()}  # type: ignore[assignment]
        process(model, *arguments)

    base_loader.process_weights_after_loading = keep_and_process
    try:
        yield
    finally:
        base_loader.process_weights_after_loading = process


@contextmanager
def worker_config(path: Path | str, rank: int = 0, store: Path | None = None, **engine_arguments: Any) -> Iterator[Any]:
    """The state that a vLLM worker has before it builds a model; gives vLLM's configuration.

    Args:
        path: the checkpoint.
        rank: this process's, when ``tensor_parallel_size`` or ``pipeline_parallel_size`` is over 1.
        store: a file by which the ranks find each other.
        engine_arguments: as for vLLM's ``EngineArgs``.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm.config import set_current_vllm_config
    from vllm.distributed import destroy_model_parallel, init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    arguments = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 64, **engine_arguments}
    config = EngineArgs(model=str(path), **arguments).create_engine_config()
    parallel = config.parallel_config
    parallel.rank = rank
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(
                world_size=parallel.world_size,
                rank=rank,
                distributed_init_method=f"file://{store or Path(tempfile.mkdtemp(), 'store')}",
                local_rank=rank,
                backend="gloo",
            )
        # Anew for each model: its groups depend on the model.
        initialize_model_parallel(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
        empty_cache = torch.accelerator.empty_cache
        torch.accelerator.empty_cache = lambda: None  # raises on a machine without an accelerator
        try:
            yield config
        finally:
            torch.accelerator.empty_cache = empty_cache
            destroy_model_parallel()


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, as raw bytes so that equality is equality of bits: as they were loaded, and as
    vLLM left them afterwards."""
    loaded: dict[str, torch.Tensor] = getattr(model, "loaded_state", {})
    assert loaded, "the model was loaded outside of vllm_model"
    return {**loaded, **{f"{name} (processed)": raw for name, raw in _raw_state(model).items()}}


def _raw_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: tensor.detach().contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor
        for name, tensor in tensors.items()
    }


def hash_state(model: torch.nn.Module) -> dict[str, str]:
    """SHA-256 of every parameter's and buffer's bits; runs in a worker too. With what :func:`loaded_state_kept` has
    kept of the state as it was loaded, before vLLM packed it."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    loaded: dict[str, torch.Tensor] = getattr(model, "loaded_state", {})
    state |= {f"{name} (loaded)": tensor for name, tensor in loaded.items()}
    return {name: _digest(tensor) for name, tensor in state.items() if tensor.numel() and not tensor.is_meta}


def _digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()
