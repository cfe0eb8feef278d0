"""A PEFT LoRA adapter: ``theta = base + (1 + alpha) * s * B A``, for every module that it names.

Format (https://huggingface.co/docs/peft/developer_guides/checkpoint): adapter_config.json, and
adapter_model.safetensors with ``base_model.model.MODULE.lora_A.weight`` (rank by in) and ``lora_B.weight`` (out by
rank), ``lora_embedding_A`` (rank by rows) and ``lora_embedding_B`` (width by rank) for an embedding, and under their
plain names the tensors that were trained whole (``modules_to_save``, biases).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from expo_serve.checkpoint.folder import Checkpoint, open_files
from expo_serve.checkpoint.records import TensorRecord
from expo_serve.checkpoint.source import read_config
from expo_serve.config import ExpoConfig, Source
from expo_serve.errors import CheckpointError
from expo_serve.plan.lora_config import CONFIG_FILE, LoraConfig, read_lora_config
from expo_serve.plan.lora_plan import plan_adapter
from expo_serve.plan.plan import Plan
from expo_serve.plan.tensor_deltas import LoraModule

_FILE = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
_FACTORS = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "A", ".lora_embedding_B": "B",
}  # fmt: skip
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")


@dataclass(frozen=True)
class LoraDelta:
    """A checked adapter."""

    source: Source
    lora: LoraConfig
    files: tuple[Path, ...]
    tensors: dict[str, TensorRecord]
    modules: tuple[LoraModule, ...]
    whole: Mapping[str, TensorRecord]
    """Tensors that were trained whole, by base's names for them."""
    kind: ClassVar[str] = "lora"
    side: ClassVar[str] = "delta"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(record.nbytes for record in self.tensors.values())

    @property
    def tokenizer(self) -> Source | None:
        """The folder, where it carries a tokenizer."""
        has_one = any(Path(self.source.path, name).is_file() for name in _TOKENIZER_FILES)
        return self.source if has_one else None

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """See :class:`~expo_serve.plan.delta.Kind`."""
        return (folder / CONFIG_FILE).is_file()

    @classmethod
    def open(cls, source: Source) -> LoraDelta:
        """See :class:`~expo_serve.plan.delta.Kind`."""
        folder = Path(source.path)
        lora = read_lora_config(read_config("delta", source, CONFIG_FILE), str(folder / CONFIG_FILE))
        if not (folder / _FILE).exists():
            raise CheckpointError(f"delta: {_nothing_to_read(folder)}")
        opened = open_files("delta", source, (folder / _FILE,))
        factors, whole = _sort(opened.tensors)
        modules = tuple(_module(name, parts, lora) for name, parts in factors.items())
        return cls(opened.source, lora, opened.files, opened.tensors, modules, whole)

    def plan(self, base: Checkpoint, config: ExpoConfig) -> Plan:
        """See :class:`~expo_serve.plan.delta.Delta`."""
        return plan_adapter(self, base, config, self.modules, self.whole, self._warnings(base))

    def _warnings(self, base: Checkpoint) -> tuple[str, ...]:
        """Trainers call a model by its hub id or by a folder of theirs, so that a difference proves little."""
        theirs, ours = (self.lora.base or "").rstrip("/"), base.source
        if not theirs or theirs in (ours.name, ours.path) or theirs.rsplit("/", 1)[-1] == ours.short_name:
            return ()
        return (
            f"the adapter {self.source.name} was trained on {theirs!r}, base is {ours.name!r}: is it the same model?",
        )


def _nothing_to_read(folder: Path) -> str:
    if (folder / _PICKLE).exists():
        return (
            f"{folder} holds its adapter as a pickle file only ({_PICKLE}), which can run code and is never opened; "
            "convert it to safetensors"
        )
    return f"{folder} has {CONFIG_FILE} but no {_FILE}"


def _sort(tensors: Mapping[str, TensorRecord]) -> tuple[dict[str, dict[str, TensorRecord]], dict[str, TensorRecord]]:
    """The factors by module, and what was trained whole by name."""
    factors: defaultdict[str, dict[str, TensorRecord]] = defaultdict(dict)
    whole: dict[str, TensorRecord] = {}
    for name, record in tensors.items():
        plain = name.removeprefix(_PREFIX)
        ending = next((ending for ending in _FACTORS if plain.endswith(ending)), None)
        if ending is None:
            whole[plain.replace(".modules_to_save", "").replace(".base_layer", "")] = record
            continue
        part = _FACTORS[ending] + (".embedding" if "embedding" in ending else "")
        factors[plain.removesuffix(ending)][part] = record
    return factors, whole


def _module(name: str, parts: dict[str, TensorRecord], lora: LoraConfig) -> LoraModule:
    is_embedding = any("embedding" in part for part in parts)
    ending = ".embedding" if is_embedding else ""
    a, b = parts.get(f"A{ending}"), parts.get(f"B{ending}")
    there = next(iter(parts.values()))
    if a is None or b is None or len(parts) != 2:
        raise CheckpointError(
            f"{there.file}: module {name!r} has no {'A' if a is None else 'B'}: expected both factors of an adapter; "
            f"found {', '.join(record.name for record in parts.values())}"
        )
    rank = lora.rank_of(name)
    if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{there.file}: module {name!r} has factors A {list(a.shape)} and B {list(b.shape)}, which do not have the "
            f"rank that {CONFIG_FILE} gives it ({rank})"
        )
    if not (a.is_float and b.is_float):
        raise CheckpointError(f"{there.file}: module {name!r} has factors of dtype {a.dtype} and {b.dtype}")
    return LoraModule(name, a, b, lora.scale_of(name), is_embedding)
