"""``expo-serve merge --out DIR``: the numbers that a load gives, as a plain checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expo_serve.cli.options import Options, Parser, add_source_flags, read_options
from expo_serve.errors import ExpoError, UsageError
from expo_serve.weights.pair import Plan, PlannedTensor
from expo_serve.weights.prepare import prepare
from expo_serve.weights.source import INDEX_FILE

if TYPE_CHECKING:
    import torch

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]B)?", re.IGNORECASE)
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.index.json")


def run(arguments: list[str]) -> int:
    """Merge; returns 0."""
    options, out, shard_bytes = _read(arguments)
    plan = prepare(options.config, options.hub)
    with _new_folder(out) as folder, _progress(plan.weight_bytes) as advance:
        _copy_side_files(Path(plan.aligned.source.path), folder)
        _write_weights(plan, folder, shard_bytes, advance)
    print(f"wrote {out}")
    return 0


def _read(arguments: list[str]) -> tuple[Options, Path, int]:
    parser = Parser(
        prog="expo-serve merge",
        description="Write the extrapolated checkpoint, with the aligned side's config and tokenizer.",
    )
    add_source_flags(parser)
    parser.add_argument("--out", metavar="DIR", help="the folder to write; it must not exist")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file (default 5GB)")
    options = read_options(parser, arguments)
    if options.unknown:
        raise UsageError(f"merge does not know {options.unknown[0]!r}; see expo-serve merge --help")
    given = options.namespace.out
    if not given:
        raise UsageError("--out is missing: expected a folder that does not exist yet")
    return options, _new_path(given), _parse_size(options.namespace.max_shard_size)


def _new_path(given: str) -> Path:
    try:
        out = Path(given).expanduser()
        if out.exists() or out.is_symlink():
            raise UsageError(f"--out: {out} exists; give a folder that does not exist yet")
        if not out.absolute().parent.is_dir():
            raise UsageError(f"--out: {out.absolute().parent} does not exist")
    except (OSError, RuntimeError) as error:  # a name too long, no right to look, the home of nobody
        raise UsageError(f"--out: {given!r:.200} cannot be written: {error}") from None
    return out


def _parse_size(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise UsageError(f"--max-shard-size: expected a size such as 5GB or 500MB, found {text!r}")
    return size


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder under a temporary name beside ``out``, renamed to it when all went well, else removed."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name[:200]}.", dir=out.absolute().parent))
    except OSError as error:
        raise ExpoError(f"merge: {out.absolute().parent} cannot be written to: {error.strerror}") from None
    try:
        yield folder
        _open_up(folder)
        folder.rename(out)
    except OSError as error:
        raise ExpoError(f"merge: {error.filename or folder}: {error.strerror}; nothing was written to {out}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _open_up(folder: Path) -> None:
    """The modes that plain mkdir and open give; temporary folders and safetensors' files are private."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)
    folder.chmod(0o777 & ~umask)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes, rate and time left on standard error, when that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("merge", total=total)
        yield lambda size: progress.advance(task, size)


def _copy_side_files(source: Path, folder: Path) -> None:
    """Config, tokenizer, chat template: every small file beside the weights."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not any(file.match(glob) for glob in _WEIGHTS):
            shutil.copyfile(file, folder / file.name)


def _write_weights(plan: Plan, folder: Path, shard_bytes: int, advance: Callable[[int], None]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards = _shards(list(plan.tensors.values()), shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {tensor.name: _value(tensor, advance) for tensor in shard}
        try:
            save_file(tensors, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, most often
            raise ExpoError(f"merge: {name} cannot be written: {error}") from None
        weight_map.update(dict.fromkeys(tensors, name))
    if len(shards) > 1:
        index: dict[str, Any] = {"metadata": {"total_size": plan.weight_bytes}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: list[PlannedTensor], limit: int) -> list[list[PlannedTensor]]:
    """Tensors in their order, cut so that no file is larger than ``limit`` unless one tensor is."""
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.aligned.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.aligned.nbytes
    return shards


def _value(tensor: PlannedTensor, advance: Callable[[int], None]) -> torch.Tensor:
    from expo_serve.weights.lazy import lazy_tensor
    from expo_serve.weights.reader import Reader
    from expo_serve.weights.tally import Tally

    value = lazy_tensor(tensor, Reader(), Tally()).materialize()
    advance(tensor.aligned.nbytes)
    return value
