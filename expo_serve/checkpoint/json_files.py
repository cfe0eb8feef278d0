"""Reads the JSON files of a checkpoint: objects in general, and the index of its shards."""

from __future__ import annotations

import json
from pathlib import Path

from expo_serve.errors import CheckpointError
from expo_serve.shown import shown

_MAX_FILE_NAME_BYTES = 255
_MAX_FILE_BYTES = 64 * 2**20
_MAX_LEVELS = 100
"""Of objects and lists in each other. Python's own limit depends on who calls, and printing one comes to it earlier."""


def read_weight_map(index: Path) -> dict[str, str]:
    """Read a safetensors index: a mapping from tensor names to file names.

    Args:
        index: the file.

    Raises:
        CheckpointError: the index cannot be read, is not JSON, has no weight_map, or names a file outside its folder.
    """
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected an object 'weight_map' from tensor names to file names")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_file_name(shard):
            raise CheckpointError(
                f"{index}: tensor {shown(tensor, 200)} is mapped to {shown(shard, 200)}; expected the file "
                "name of a shard in this folder"
            )
    return weight_map


def read_json(path: Path) -> object:
    """Read a JSON file.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file cannot be read, is too large, is not JSON or nests too deep.
    """
    try:
        if (size := path.stat().st_size) > _MAX_FILE_BYTES:
            raise CheckpointError(f"{path}: has {size} bytes, the limit is {_MAX_FILE_BYTES}; is this the right file?")
        content: object = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not _is_flat(content, _MAX_LEVELS):
        raise CheckpointError(f"{path}: nests more than {_MAX_LEVELS} levels deep")
    return content


def _is_flat(value: object, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_flat(child, levels - 1) for child in children if isinstance(child, dict | list))


def _is_file_name(name: str) -> bool:
    size = len(name.encode(errors="surrogatepass"))
    return (
        name.isprintable()
        and name not in (".", "..")
        and 0 < size <= _MAX_FILE_NAME_BYTES
        and not set(name) & set("/\\\0")
    )
