"""A plan's result as a plain checkpoint on disk: tensor by tensor, so that memory holds a few of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from expo_serve.checkpoint.source import INDEX_FILE
from expo_serve.checkpoint.writer import SafetensorsWriter, header_bytes, sizes_of
from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.session import LoadSession
from expo_serve.load.threads import in_order
from expo_serve.plan.plan import PlannedTensor

_THREADS = 2
"""Each result is a whole tensor, so that few are under way; a disk is filled by two."""
_METADATA = {"format": "pt"}  # transformers asks for it


def save(tensors: list[PlannedTensor], folder: Path, shard_bytes: int, advance: Callable[[int], None]) -> None:
    """Write the weights: one file, or several and their index.

    Args:
        tensors: what the result has.
        folder: where to.
        shard_bytes: the largest file, unless one tensor is larger.
        advance: told of bytes of the result that are done.

    Raises:
        ExpoError: a source cannot be read, or a value is not finite.
        OSError: the folder cannot be written to.
    """
    shards = _shards(tensors, shard_bytes)
    weight_map: dict[str, str] = {}
    session = LoadSession()
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write(shard, folder / name, lambda tensor: _value(tensor, session), advance)
        weight_map.update(dict.fromkeys((tensor.name for tensor in shard), name))
    if len(shards) > 1:
        total = sum(tensor.result.nbytes for tensor in tensors)
        index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: list[PlannedTensor], limit: int) -> list[list[PlannedTensor]]:
    """Tensors in their order, cut so that no file is larger than ``limit`` unless one tensor is."""
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.result.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.result.nbytes
    return shards


def _write(
    shard: list[PlannedTensor],
    file: Path,
    value: Callable[[PlannedTensor], torch.Tensor],
    advance: Callable[[int], None],
) -> None:
    # The widest first, as the format's own library orders them, so that every tensor is aligned to its dtype.
    ordered = sorted(shard, key=lambda tensor: -tensor.result.nbytes // max(1, tensor.result.numel))
    header = header_bytes(sizes_of({tensor.name: tensor.result for tensor in ordered}), _METADATA)
    offset = 0
    with SafetensorsWriter(file, len(header)) as writer:
        for tensor, values in in_order(value, ordered, _THREADS):
            writer.write(offset, memoryview(values.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
            offset += tensor.result.nbytes
            advance(tensor.result.nbytes)
        writer.finish(header)


def _value(tensor: PlannedTensor, session: LoadSession) -> torch.Tensor:
    return lazy_tensor(tensor, session).materialize().contiguous()
