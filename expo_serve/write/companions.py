"""Companion files of a checkpoint: config, tokenizer, chat template and all other files that hold no weights."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.index.json")


def copy_companion_files(source: Path, folder: Path, leave_out: Collection[str] = ()) -> None:
    """Copy every file of ``source`` that holds no weights into ``folder``; hidden files and folders are skipped.

    Args:
        source: folder of a checkpoint.
        folder: existing folder to copy into.
        leave_out: names of further files to skip.

    Raises:
        OSError: a file cannot be read or written.
    """
    for file in sorted(source.iterdir()):
        is_skipped = file.name.startswith(".") or file.name in leave_out
        if file.is_file() and not is_skipped and not any(file.match(glob) for glob in _WEIGHTS):
            shutil.copyfile(file, folder / file.name)
