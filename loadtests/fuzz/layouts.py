"""Folders of odd layouts: which names there are in a checkpoint's folder, and what lies under them.

A layout is JSON, a list of ``[name, kind, what]``: a file with the content ``what``, a ``copy`` of a file of base, a
``link`` to a path, a ``fifo`` or a ``folder``. Whatever cannot be made is left out.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from tests.models.raw import INDEX

KINDS = ("file", "copy", "link", "fifo", "folder")
NAMES = (
    "config.json", "model.safetensors", INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "pytorch_model.bin", "consolidated.safetensors", "adapter_config.json", "adapter_model.safetensors",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "chat_template.jinja",
    "quantize_config.json", ".hidden.safetensors", "a\nb.safetensors", "\x1b[31mred.safetensors", "x.gguf",
    "model-00001-of-999999999.safetensors", "sub/adapter_config.json",
)  # fmt: skip
TARGETS = (
    "../outside/config.json", "../outside/model.safetensors", "../base/model.safetensors", "../base/config.json",
    "/dev/zero", "/etc/passwd", "model.safetensors", "gone", ".", "..", "/proc/self/mem", "../outside",
)  # fmt: skip
_MOST = 12
SEEDS = tuple(
    json.dumps(layout).encode()
    for layout in (
        [["config.json", "copy", "config.json"], ["model.safetensors", "copy", "model.safetensors"]],
        [["config.json", "link", "../outside/config.json"], ["model.safetensors", "link", "../base/model.safetensors"]],
        [["config.json", "copy", "config.json"], ["a.safetensors", "fifo", ""], ["b.safetensors", "folder", ""]],
        [["adapter_config.json", "file", "{}"], ["sub/adapter_config.json", "file", "{}"]],
    )
)


def place_layout(folder: Path, data: bytes) -> None:
    """Make a folder of this layout, in the place of what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        layout = json.loads(data)
    except (ValueError, RecursionError):
        return
    for entry in layout[:_MOST] if isinstance(layout, list) else ():
        if isinstance(entry, list) and len(entry) == 3 and all(isinstance(part, str) for part in entry):
            with suppress(OSError, ValueError):
                _put(folder, *entry)


def _put(folder: Path, name: str, kind: str, what: str) -> None:
    """Make one entry, within the folder and where nothing is yet: what was made before may be a link, or a pipe."""
    path = folder / name
    if path == folder or not Path(os.path.normpath(path)).is_relative_to(folder):
        return
    path.parent.mkdir(exist_ok=True)
    if not path.parent.resolve().is_relative_to(folder.resolve()) or os.path.lexists(path):
        return
    match kind:
        case "file":
            path.write_text(what)
        case "copy":
            path.write_bytes((folder.parent / "base" / Path(what).name).read_bytes())
        case "link":
            path.symlink_to(what)
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
