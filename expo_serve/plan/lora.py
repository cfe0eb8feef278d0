"""A PEFT LoRA adapter: ``theta = base + (1 + alpha) * s * B A``, for every module that it names.

Format (https://huggingface.co/docs/peft/developer_guides/checkpoint): adapter_config.json, and
adapter_model.safetensors with ``base_model.model.MODULE.lora_A.weight`` (rank by in) and ``lora_B.weight`` (out by
rank), ``lora_embedding_A`` (rank by rows) and ``lora_embedding_B`` (width by rank) for an embedding, and under their
plain names the tensors that were trained whole (``modules_to_save``, biases).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from expo_serve.checkpoint.folder import Checkpoint, open_files
from expo_serve.checkpoint.records import Operand, TensorRecord
from expo_serve.checkpoint.source import read_config
from expo_serve.config import ExpoConfig, Source
from expo_serve.errors import CheckpointError, PairError
from expo_serve.plan.lora_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LoraConfig,
    make_module,
    nothing_to_read,
    read_lora_config,
    sort_tensors,
)
from expo_serve.plan.names import is_embedding, is_output, may_tie_output, vocabulary_sizes
from expo_serve.plan.over_base import BaseChanges, base_names, plan_over_base
from expo_serve.plan.plan import OpenedSource, Plan
from expo_serve.plan.tensor_deltas import LoraModule, LowRankTensorDelta

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
    format: ClassVar[str] = "lora"
    operand: ClassVar[Operand] = "delta"

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
        """See :class:`~expo_serve.plan.delta.DeltaFormat`."""
        return (folder / CONFIG_FILE).is_file()

    @classmethod
    def open(cls, source: Source) -> LoraDelta:
        """See :class:`~expo_serve.plan.delta.DeltaFormat`."""
        folder = Path(source.path)
        lora = read_lora_config(read_config("delta", source, CONFIG_FILE), str(folder / CONFIG_FILE))
        if not (folder / WEIGHTS_FILE).exists():
            raise CheckpointError(f"delta: {nothing_to_read(folder)}")
        opened = open_files("delta", source, (folder / WEIGHTS_FILE,))
        factors, whole = sort_tensors(opened.tensors)
        modules = tuple(make_module(name, parts, lora) for name, parts in factors.items())
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


class Adapter(OpenedSource, Protocol):
    """The adapter that is planned."""

    @property
    def tokenizer(self) -> Source | None:
        """Where it carries one."""


def plan_adapter(
    adapter: Adapter,
    base: Checkpoint,
    config: ExpoConfig,
    modules: Sequence[LoraModule],
    whole: Mapping[str, TensorRecord],
    warnings: tuple[str, ...],
) -> Plan:
    """Find base's tensor for every module.

    Raises:
        PairError: base lacks one, or it has another shape.
        UsageError: an alpha rule that matches no tensor.
    """
    inputs_first = _stores_inputs_first(base)
    modules = [replace(module, inputs_first=inputs_first and not _names_output(module.name)) for module in modules]
    names = base_names([*(f"{module.name}.weight" for module in modules), *whole], base)
    homes = {name: _home(theirs, base) for name, theirs in names.items()}
    _refuse_strangers(adapter, base, homes, whole, config)
    grouped: defaultdict[str, list[LoraModule]] = defaultdict(list)
    for module in modules:
        grouped[homes[f"{module.name}.weight"]].append(module)
    placed = {names[name]: record for name, record in whole.items()}
    adapted = {names[f"{module.name}.weight"]: homes[f"{module.name}.weight"] for module in modules}
    starts = _take_starts(adapted, placed, base)
    steps = {
        name: LowRankTensorDelta(base.tensors[name], tuple(group), starts.get(name)) for name, group in grouped.items()
    }
    _refuse_shapes(adapter, steps)
    partners = {name: base.tensors[home] for name in placed if (home := _home(name, base)) in base.tensors}
    _refuse_whole(adapter, adapted, placed, partners)
    copies = _untied_output(placed, base)
    _refuse_lone_embedding(adapter, placed, copies)
    overrides = {**_overrides(placed, base), **({"tie_word_embeddings": False} if copies else {})}
    new = {name: partner for name, partner in partners.items() if name not in base.tensors}
    warnings = (*warnings, *_tied_warnings(steps, base))
    changes = BaseChanges(steps, placed, new, copies, overrides, warnings=warnings)
    return plan_over_base(adapter, base, config, changes, adapter.tokenizer)


def _names_output(name: str) -> bool:
    return name.removesuffix(".weight").endswith(("lm_head", "embed_out"))


def _stores_inputs_first(base: Checkpoint) -> bool:
    """Whether base is of the kind (GPT-2) whose layers, all but the output, are stored with their inputs first.

    The adapter's ``fan_in_fan_out`` does not say it: PEFT writes down that of the module it came to last. Such layers
    always have a bias, as long as the second of the weight's sizes, and some of them are not square.
    """
    biases = {name: record.shape for name, record in base.tensors.items() if name.endswith(".bias")}
    return any(
        len(record.shape) == 2
        and record.shape[0] != record.shape[1]
        and biases.get(f"{name.removesuffix('.weight')}.bias") == record.shape[1:]
        for name, record in base.tensors.items()
    )


def _take_starts(
    adapted: Mapping[str, str], placed: dict[str, TensorRecord], base: Checkpoint
) -> dict[str, TensorRecord]:
    """Tensors that the adapter holds beside their factors, as PEFT saves an embedding or output that it adapts: the
    product is added to them. They are taken out of ``placed``; what comes back is by base's tensor.

    Args:
        adapted: the tensors with factors, and base's for each.
        placed: what the adapter holds whole.
        base: whose shapes count.
    """
    starts: dict[str, TensorRecord] = {}
    for name, home in adapted.items():
        record = placed.get(name)
        if record is not None and record.is_float and record.shape == base.tensors[home].shape:
            starts.setdefault(home, placed.pop(name))
            placed.pop(name, None)
    return starts


def _untied_output(placed: Mapping[str, TensorRecord], base: Checkpoint) -> dict[str, TensorRecord]:
    """The output of a tied base whose embedding was trained whole, and alone: it stays as base's embedding was."""
    has_output = any(is_output(record) for record in (*base.tensors.values(), *placed.values()))
    trained = [base.tensors[name] for name, record in placed.items() if name in base.tensors and is_embedding(record)]
    if has_output or not trained or not may_tie_output(base.config):
        return {}
    name = "embed_out.weight" if "embed_in" in trained[0].name else "lm_head.weight"
    return {name: trained[0]}


def _refuse_lone_embedding(
    adapter: Adapter, placed: Mapping[str, TensorRecord], copies: Mapping[str, TensorRecord]
) -> None:
    if any(placed[record.name].shape != record.shape for record in copies.values()):
        raise PairError(
            f"the adapter ({adapter.source.name}) has an embedding of more rows, no output of as many, and base ties "
            "the two: which output it was trained with is not known; merge it with PEFT and give --aligned"
        )


def _tied_warnings(steps: Mapping[str, LowRankTensorDelta], base: Checkpoint) -> tuple[str, ...]:
    """Merging with PEFT changes both ends of a tied model; before merging, an adapter changes one."""
    has_output = any(is_output(record) for record in base.tensors.values())
    ends = [name for name, change in steps.items() if is_embedding(change.base)]
    if has_output or not ends or not may_tie_output(base.config):
        return ()
    return (
        f"base ties its output to its embedding: the adapter on it changes both ({ends[0]}), as merging with PEFT does",
    )


def _home(name: str, base: Checkpoint) -> str:
    """The tensor of base that a name means: an output that base does not store is its embedding."""
    if name in base.tensors or not _names_output(name):
        return name
    embeddings = [record.name for record in base.tensors.values() if is_embedding(record)]
    return embeddings[0] if len(embeddings) == 1 and may_tie_output(base.config) else name


def _refuse_strangers(
    adapter: Adapter,
    base: Checkpoint,
    homes: Mapping[str, str],
    whole: Mapping[str, TensorRecord],
    config: ExpoConfig,
) -> None:
    strangers = [name for name, home in homes.items() if home not in base.tensors]
    if config.unmatched == "copy":
        strangers = [name for name in strangers if name not in whole]
    if strangers:
        only_whole = all(name in whole for name in strangers)
        raise PairError(
            f"the adapter ({adapter.source.name}) changes {len(strangers)} tensors that base ({base.source.name}) "
            f"lacks, the first {strangers[0]}; give the base that it was trained on"
            + (", or --unmatched copy to take them over" if only_whole else ""),
            [f"only in the adapter: {name}" for name in strangers],
        )


def _refuse_shapes(adapter: Adapter, steps: Mapping[str, LowRankTensorDelta]) -> None:
    wrong = [
        f"{name}: base {list(change.base.shape)}, adapter B {list(module.b.shape)} times A {list(module.a.shape)}"
        for name, change in steps.items()
        for module in change.modules
        if module.orientation(change.base.shape) is None or not change.base.is_float
    ]
    if wrong:
        raise PairError(
            f"the adapter ({adapter.source.name}) does not fit base: {len(wrong)} of {len(steps)} modules have another "
            f"shape, the first {wrong[0].split(':')[0]}; give the base that it was trained on",
            wrong,
        )


def _refuse_whole(
    adapter: Adapter,
    adapted: Mapping[str, str],
    placed: Mapping[str, TensorRecord],
    partners: Mapping[str, TensorRecord],
) -> None:
    twice = [name for name in placed if name in adapted or name in adapted.values()]
    if twice:
        raise PairError(
            f"the adapter ({adapter.source.name}) has both factors and a whole tensor of another shape for "
            f"{twice[0]}, as "
            "PEFT saves it when a vocabulary was resized: merge it with PEFT and give --aligned"
        )
    wrong = [
        f"{name}: base {list(partner.shape)}, adapter {list(placed[name].shape)}"
        for name, partner in partners.items()
        if not _can_replace(placed[name], partner)
    ]
    if wrong:
        raise PairError(
            f"the adapter ({adapter.source.name}) does not fit base: {len(wrong)} of the tensors that it holds "
            f"whole have "
            "another shape; give the base that it was trained on",
            wrong,
        )


def _can_replace(whole: TensorRecord, base: TensorRecord) -> bool:
    """Of one shape, or with more rows of a vocabulary."""
    has_rows = is_embedding(whole) or is_output(whole) or is_embedding(base) or is_output(base)
    grows = has_rows and len(base.shape) == len(whole.shape) > 0 and whole.shape[0] > base.shape[0]
    return (
        whole.is_float
        and base.is_float
        and (whole.shape == base.shape or (grows and whole.shape[1:] == base.shape[1:]))
    )


def _overrides(placed: Mapping[str, TensorRecord], base: Checkpoint) -> dict[str, Any]:
    """What the config must say otherwise: the number of rows of a grown vocabulary, and that an output of its own
    came."""
    overrides: dict[str, Any] = {}
    rows = {
        record.shape[0] for name, record in placed.items()
        if (there := base.tensors.get(name)) and is_embedding(there) and record.shape[0] != there.shape[0]
    }  # fmt: skip
    if rows and vocabulary_sizes(base.config):
        size = {"vocab_size": max(rows)}
        overrides.update(size if "vocab_size" in base.config else {"text_config": size})
    if any(is_output(record) and name not in base.tensors for name, record in placed.items()):
        overrides["tie_word_embeddings"] = False
    return overrides
