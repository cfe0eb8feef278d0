"""Writes a plan's result as a plain checkpoint, tensor by tensor, so that only a few results are in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from expo_serve.checkpoint.file_names import INDEX_FILE
from expo_serve.checkpoint.writer import SafetensorsWriter, header_bytes, sizes_of
from expo_serve.config import ExpoConfig
from expo_serve.errors import warn
from expo_serve.load.fill import missing_kernels
from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.session import LoadSession, Observer
from expo_serve.load.threads import in_order
from expo_serve.plan.plan import Plan, PlannedTensor
from expo_serve.progress import Progress
from expo_serve.write.companions import copy_companion_files
from expo_serve.write.provenance import metadata, write_card

_THREADS = 2
"""Two threads saturate a disk; more would hold more whole tensors in memory."""
_METADATA = {"format": "pt"}  # required by transformers
_OF_ADAPTERS = ("config.json", "README.md")
"""Files of an adapter's folder that describe the adapter, not the merged model."""


def write_checkpoint(
    plan: Plan,
    config: ExpoConfig,
    folder: Path,
    shard_bytes: int,
    progress: Progress,
    observe: Observer | None = None,
) -> None:
    """Write a plan's result into a folder, with its config and tokenizer.

    Args:
        plan: every tensor of it is written.
        config: what was planned, to be recorded.
        folder: existing, empty folder.
        shard_bytes: size limit of one file; a single larger tensor exceeds it.
        progress: counts bytes of the result.
        observe: is called with every block that is computed.

    Raises:
        ExpoError: a source cannot be read, or a value is not finite.
        OSError: the folder cannot be written to.
    """
    copy_companion_files(plan.model, folder)
    if plan.tokenizer:
        copy_companion_files(plan.tokenizer, folder, leave_out=_OF_ADAPTERS)
    if plan.overrides:
        _override(folder / "config.json", plan.overrides)
    write_card(folder, plan, config)
    session = LoadSession(observe=observe)
    progress.watch(session.reader.activity)
    _write_weights(plan, folder, shard_bytes, progress, session, {**_METADATA, **metadata(plan, config)})
    if reason := missing_kernels():
        warn(reason)


def _override(file: Path, overrides: dict[str, Any]) -> None:
    config = json.loads(file.read_bytes())
    for key, value in overrides.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(config, indent=2) + "\n")


def _write_weights(
    plan: Plan,
    folder: Path,
    shard_bytes: int,
    progress: Progress,
    session: LoadSession,
    metadata: dict[str, str],
) -> None:
    """Write one file, or several and their index."""
    tensors = list(plan.tensors.values())
    shards = _shards(tensors, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(shard, folder / name, lambda tensor: _value(tensor, session), progress, metadata)
        weight_map.update(dict.fromkeys((tensor.name for tensor in shard), name))
    if len(shards) > 1:
        total = sum(tensor.result.nbytes for tensor in tensors)
        index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: list[PlannedTensor], limit: int) -> list[list[PlannedTensor]]:
    """Split the tensors, in their order, into files of at most ``limit`` bytes or one tensor."""
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.result.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.result.nbytes
    return shards


def _write_shard(
    shard: list[PlannedTensor],
    file: Path,
    value: Callable[[PlannedTensor], torch.Tensor],
    progress: Progress,
    metadata: dict[str, str],
) -> None:
    # Widest dtype first, as the safetensors library orders them, so that every tensor is aligned to its dtype.
    ordered = sorted(shard, key=lambda tensor: -tensor.result.nbytes // max(1, tensor.result.numel))
    header = header_bytes(sizes_of({tensor.name: tensor.result for tensor in ordered}), metadata)
    offset = 0
    with SafetensorsWriter(file, len(header)) as writer:
        for tensor, values in in_order(value, ordered, _THREADS):
            writer.write(offset, values.view(-1).view(torch.uint8).numpy().data)
            offset += tensor.result.nbytes
            progress.advance(tensor.result.nbytes)
        writer.finish(header)


def _value(tensor: PlannedTensor, session: LoadSession) -> torch.Tensor:
    return lazy_tensor(tensor, session).materialize().contiguous()
