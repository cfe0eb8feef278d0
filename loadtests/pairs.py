"""The pairs that are measured: the demo's real one, and random ones of real shapes.

``aligned`` is ``base`` plus a small random step. Tensors are written one by one as they are made, so that a pair of
6 GB a side needs no more memory than its largest matrix. Tokenizer and vocabulary are the demo's, so that a random
model can be served and asked too.

    python -m loadtests.pairs --size 1.1b     make the pair in .bench/pairs and leave it there
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from loadtests.results import parser

DEMO = Path(".demo")
SIDES = ("base", "aligned")
VOCABULARY = 49152
_MAX_SHARD_BYTES = 5 * 10**9
_SPREAD, _STEP = 0.02, 0.0002
_SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

# Shapes of models that people serve; the vocabulary is the demo's in all of them.
_SHAPES: dict[str, dict[str, Any]] = {
    "0.1b": {"layers": 12, "hidden": 768, "intermediate": 2048, "heads": 12, "kv_heads": 4, "tied": True},
    "0.5b": {"layers": 24, "hidden": 1024, "intermediate": 4096, "heads": 16, "kv_heads": 8, "tied": False},
    "1.1b": {"layers": 22, "hidden": 2048, "intermediate": 5632, "heads": 32, "kv_heads": 4, "tied": False},
    "3b": {"layers": 28, "hidden": 3072, "intermediate": 8192, "heads": 24, "kv_heads": 8, "tied": True},
}
SIZES = ("demo", *_SHAPES)


@dataclass(frozen=True)
class Pair:
    """Two checkpoints in folders."""

    size: str
    base: Path
    aligned: Path

    @property
    def files(self) -> list[Path]:
        """The files with weights, of both sides."""
        return [*weight_files(self.base), *weight_files(self.aligned)]

    @cached_property
    def side_bytes(self) -> int:
        """Size of the aligned side's files."""
        return sum(file.stat().st_size for file in weight_files(self.aligned))


def weight_files(folder: Path) -> list[Path]:
    """The files with weights of a checkpoint."""
    return sorted(folder.glob("*.safetensors"))


@contextmanager
def pair_of(size: str, work: Path, keep: bool = False) -> Iterator[Pair]:
    """A pair of a size; a random one is made unless it is there, and removed in the end unless ``keep``."""
    if size == "demo":
        yield Pair(size, DEMO / "base", DEMO / "aligned")
        return
    folder = work / "pairs" / size
    there = folder.is_dir()
    if not there:
        _make(size, folder)
    try:
        yield Pair(size, folder / "base", folder / "aligned")
    finally:
        if not (keep or there):
            shutil.rmtree(folder)


def _make(size: str, folder: Path) -> None:
    """Make both sides at once under another name, so that a cut run leaves no half pair behind."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    config = _config(size)
    with torch.device("meta"):
        state = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    # In a tied model's file the output projection does not stand twice.
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if not _is_tied(name, config)}
    for side in SIDES:
        config.save_pretrained(unfinished / side)
        for name in _SIDE_FILES:
            shutil.copy(DEMO / "aligned" / name, unfinished / side / name)
    shards = _shards(shapes)
    for number, shard in enumerate(shards, 1):
        _write_shard(shard, unfinished, _shard_name(number, len(shards)))
    if len(shards) > 1:
        _write_index(shards, unfinished)
    unfinished.rename(folder)


def _config(size: str) -> Any:
    shape = _SHAPES[size]
    config = transformers.LlamaConfig(
        num_hidden_layers=shape["layers"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        tie_word_embeddings=shape["tied"],
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    return config


def _is_tied(name: str, config: Any) -> bool:
    return bool(config.tie_word_embeddings) and name == "lm_head.weight"


def _bytes(shape: Sequence[int]) -> int:
    return 2 * torch.Size(shape).numel()


def _shards(shapes: dict[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    """Tensors in their order, a new file where the next one does not fit any more."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        if used and used + _bytes(shape) > _MAX_SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += _bytes(shape)
    return shards


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _write_shard(shapes: dict[str, tuple[int, ...]], folder: Path, file: str) -> None:
    """One file of both sides; its format is a length, a header in JSON, and the values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + _bytes(shape)]}
        end += _bytes(shape)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (folder / "base" / file).open("wb") as base, (folder / "aligned" / file).open("wb") as aligned:
        for side in (base, aligned):
            side.write(len(raw).to_bytes(8, "little") + raw)
        for name, shape in shapes.items():
            before, after = _tensors(name, shape)
            before.view(torch.uint8).numpy().tofile(base)
            after.view(torch.uint8).numpy().tofile(aligned)


def _tensors(name: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of base, and the same one a small step further. The name is the seed: every run makes the same pair."""
    generator = torch.Generator().manual_seed(sum((place + 1) * ord(letter) for place, letter in enumerate(name)))
    values = torch.randn(shape, generator=generator).mul_(_SPREAD)
    if len(shape) == 1:  # a norm
        values += 1
    base = values.to(torch.bfloat16)
    return base, values.copy_(base).add_(torch.randn(shape, generator=generator), alpha=_STEP).to(torch.bfloat16)


def _write_index(shards: list[dict[str, tuple[int, ...]]], folder: Path) -> None:
    numbered = list(enumerate(shards, 1))
    index = {
        "metadata": {"total_size": sum(_bytes(shape) for shard in shards for shape in shard.values())},
        "weight_map": {name: _shard_name(number, len(shards)) for number, shard in numbered for name in shard},
    }
    for side in SIDES:
        (folder / side / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def main() -> None:
    """Make one pair and say where it is."""
    options = parser(__doc__, size="0.5b", rounds=0).parse_args()
    with pair_of(options.size, options.work, keep=True) as pair:
        print(f"{pair.base} and {pair.aligned}: {pair.side_bytes / 1e9:.2f} GB a side")


if __name__ == "__main__":
    main()
