"""A PEFT LoRA adapter: the result is ``base + (1 + alpha) * scale * B A`` for every module that the adapter names.

:mod:`expo_serve.plan.lora_format` describes the adapter's files. Tensors that were trained whole are extrapolated
against base's; what the adapter does not name is base's at every alpha.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from expo_serve.checkpoint.file_names import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS
from expo_serve.checkpoint.folder import Checkpoint, open_files
from expo_serve.checkpoint.links import is_file
from expo_serve.checkpoint.records import JsonObject, Operand, TensorRecord, total_bytes
from expo_serve.checkpoint.source import TOKENIZER_FILES, read_config
from expo_serve.config import ExpoConfig, Source
from expo_serve.errors import CheckpointError, PairError, count_of
from expo_serve.plan.conversion import same_ending, stored_instead
from expo_serve.plan.lora_format import (
    LoraConfig,
    nothing_to_read,
    read_lora_config,
    sort_tensors,
)
from expo_serve.plan.matching import Tensors, base_candidates, base_names, shared_targets
from expo_serve.plan.names import is_embedding, is_output, may_tie_output, vocabulary_sizes
from expo_serve.plan.over_base import BaseChanges, plan_over_base
from expo_serve.plan.plan import Doubt, Plan
from expo_serve.plan.samples import are_zero
from expo_serve.plan.tensor_deltas import LoraModule, LowRankTensorDelta
from expo_serve.shown import shown

_QUANTISED_COPY = re.compile(r"(-unsloth)?(-bnb)?-[48]bit$")
_MERGE = "merge it with PEFT and give the result as --aligned"


@dataclass(frozen=True)
class LoraDelta:
    """A checked adapter."""

    source: Source
    adapter_config: LoraConfig
    files: tuple[Path, ...]
    tensors: dict[str, TensorRecord]
    modules: tuple[LoraModule, ...]
    whole_tensors: Tensors
    """Tensors that were trained whole, by base's names for them."""
    format: ClassVar[str] = "lora"
    operand: ClassVar[Operand] = "delta"

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return total_bytes(self.tensors.values())

    @property
    def tokenizer(self) -> Source | None:
        """The adapter's folder, if it contains a tokenizer."""
        folder = Path(self.source.path)
        has_one = any(is_file(folder / name) for name in (*TOKENIZER_FILES, "tokenizer_config.json"))
        return self.source if has_one else None

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Return whether the folder has an adapter_config.json."""
        return is_file(folder / ADAPTER_CONFIG)

    @classmethod
    def open(cls, source: Source) -> LoraDelta:
        """Read and check the config and the headers.

        Raises:
            CheckpointError: the adapter is not a plain sum on base's weights, or a file breaks the format.
        """
        folder = Path(source.path)
        config = read_lora_config(read_config("delta", source, ADAPTER_CONFIG), str(folder / ADAPTER_CONFIG))
        weights = folder / ADAPTER_WEIGHTS
        if not os.path.lexists(weights) and source.pickles:
            weights = folder / ADAPTER_PICKLE
        if not os.path.lexists(weights):
            raise CheckpointError(f"delta: {nothing_to_read(folder)}")
        opened = open_files("delta", source, (weights,))
        modules, whole = sort_tensors(opened.tensors, config)
        return cls(opened.source, config, opened.files, opened.tensors, modules, whole)

    def plan(self, base: Checkpoint, config: ExpoConfig) -> Plan:
        """Find base's tensor for every module and every whole tensor, and decide for every tensor of base.

        Raises:
            PairError: base lacks a tensor that the adapter changes, or has it in another shape or layout, or several
                could be meant.
            UsageError: an alpha rule matches no tensor.
        """
        modules = _oriented(self.modules, base)
        changed = [*(f"{module.name}.weight" for module in modules), *self.whole_tensors]
        names = base_names(changed, base.tensors, base.config)
        targets = {name: _target(renamed, base) for name, renamed in names.items()}
        self._refuse_unknown(targets, base, config)
        self._refuse_shared(names, base)
        adapted = {names[f"{module.name}.weight"]: targets[f"{module.name}.weight"] for module in modules}
        stored = {names[name]: record for name, record in self.whole_tensors.items()}
        beside_factors = _beside_factors(adapted, stored, base)
        starts = {adapted[name]: stored[name] for name in reversed(beside_factors)}  # of tied tensors the first counts
        whole = {name: record for name, record in stored.items() if name not in beside_factors}
        grouped: defaultdict[str, list[LoraModule]] = defaultdict(list)
        for module in modules:
            grouped[targets[f"{module.name}.weight"]].append(module)
        deltas = {
            name: LowRankTensorDelta(base.tensors[name], tuple(group), starts.get(name))
            for name, group in grouped.items()
        }
        self._refuse_shapes(deltas)
        partners = {name: base.tensors[target] for name in whole if (target := _target(name, base)) in base.tensors}
        self._refuse_whole(adapted, whole, partners)
        copies = {} if self.adapter_config.is_tied else _untied_output(whole, base)
        self._refuse_lone_embedding(whole, copies)
        changes = BaseChanges(
            deltas,
            whole,
            partners={name: partner for name, partner in partners.items() if name not in base.tensors},
            copies=copies,
            overrides={**_overrides(whole, base), **({"tie_word_embeddings": False} if copies else {})},
            warnings=(*_tied_warnings(deltas, base), *self._warnings(base, deltas)),
            doubts=tuple(self._doubts(base)),
        )
        return plan_over_base(self, base, config, changes, self.tokenizer)

    def _doubts(self, base: Checkpoint) -> Iterator[Doubt]:
        """Doubt an adapter that names another base; trainers write a hub id or a path of their own machine there."""
        trained_on = (self.adapter_config.base or "").rstrip("/")
        found = base.source
        names = [name for name in (found.name, base.config.get("_name_or_path")) if isinstance(name, str)]
        if not trained_on or trained_on == found.path or _short(trained_on) in map(_short, names):
            return
        yield Doubt(
            "other-base",
            f"the adapter {self.source.name} was trained on {shown(trained_on, 200)}, base is {found.name!r}; give "
            "the base that it was trained on",
        )

    def _warnings(self, base: Checkpoint, deltas: Mapping[str, LowRankTensorDelta]) -> Iterator[str]:
        twice = [name for name, delta in deltas.items() if len(delta.modules) > 1]
        if self.adapter_config.is_tied and twice:
            yield (
                f"the adapter ({self.source.name}) changes both ends of a tied model alike (ensure_weight_tying), and "
                f"merging with PEFT adds this change to {twice[0]} twice, as is done here: the trained model has it "
                "once; check the answers"
            )
        if self.modules and not self.whole_tensors and are_zero(module.b for module in self.modules):
            yield (
                f"the first values of every B of the adapter ({self.source.name}) are 0, as before its training, so "
                "every alpha gives base; were the trained values saved?"
            )
        trained = self.adapter_config.bias
        has_biases = any(_is_bias(record) for record in base.tensors.values())
        if trained != "none" and has_biases and not any(name.endswith(".bias") for name in self.whole_tensors):
            yield (
                f"the adapter ({self.source.name}) was trained with biases (bias: {trained!r:.40} in "
                f"{ADAPTER_CONFIG}), but holds none, as PEFT saves them: base's biases stay as they are"
            )

    def _refuse_unknown(self, targets: Mapping[str, str], base: Checkpoint, config: ExpoConfig) -> None:
        unknown = [name for name, target in targets.items() if target not in base.tensors]
        if config.unmatched == "copy":
            unknown = [name for name in unknown if name not in self.whole_tensors]
        if unknown:
            can_copy = all(name in self.whole_tensors for name in unknown)
            raise PairError(
                f"the adapter ({self.source.name}) changes {count_of(len(unknown), 'tensor')} that base "
                f"({base.source.name}) lacks, the first {unknown[0]}; {_advice(unknown, targets, base)}"
                + (", or --unmatched copy to copy them" if can_copy else ""),
                [f"only in the adapter: {name}" for name in unknown],
            )

    def _refuse_shared(self, names: Mapping[str, str], base: Checkpoint) -> None:
        """Refuse two names of the adapter for one tensor of base. A tied output is base's embedding by other rules."""
        if shared := shared_targets(names, base.tensors):
            target, group = next(iter(shared.items()))
            raise PairError(
                f"the adapter ({self.source.name}) changes {count_of(len(shared), 'tensor')} of base twice, under "
                f"several names, the first {target} as {' and '.join(group[:3])}; save one adapter alone",
                [f"{target}: {', '.join(group)}" for target, group in shared.items()],
            )

    def _refuse_shapes(self, deltas: Mapping[str, LowRankTensorDelta]) -> None:
        wrong = [
            f"{name}: base {list(delta.base.shape)}, adapter B {list(module.b.shape)} times A {list(module.a.shape)}"
            for name, delta in deltas.items()
            for module in delta.modules
            if module.orientation(delta.base.shape) is None or not delta.base.is_float
        ]
        if wrong:
            grouped = [name for name, delta in deltas.items() if len(delta.base.shape) > 2 and delta.base.shape[1] == 1]
            if first := next((name for name in grouped if any(line.startswith(f"{name}:") for line in wrong)), None):
                raise PairError(
                    f"the adapter ({self.source.name}) adapts a grouped convolution ({first} "
                    f"{list(deltas[first].base.shape)}), whose weight is no product of its factors: PEFT cannot merge "
                    "it either; train the adapter without this module",
                    wrong,
                )
            total = sum(len(delta.modules) for delta in deltas.values())
            raise PairError(
                f"the adapter ({self.source.name}) does not fit base: shape or kind differs in {len(wrong)} of "
                f"{count_of(total, 'module')}, the first {wrong[0].split(':')[0]}; give the base that the "
                "adapter was trained on",
                wrong,
            )

    def _refuse_whole(self, adapted: Mapping[str, str], whole: Tensors, partners: Tensors) -> None:
        both = [name for name in whole if name in adapted or name in adapted.values()]
        if both:
            raise PairError(
                f"the adapter ({self.source.name}) has both factors and a whole tensor of another shape for {both[0]}, "
                f"as PEFT saves them when a vocabulary was resized; {_MERGE}"
            )
        wrong = [
            f"{name}: base {list(partner.shape)}, adapter {list(whole[name].shape)}"
            for name, partner in partners.items()
            if not _can_replace(whole[name], partner)
        ]
        if wrong:
            cut = [
                f"{name}: {whole[name].shape[0]} rows, base {partner.shape[0]}"
                for name, partner in partners.items()
                if (is_embedding(partner) or is_output(partner)) and partner.is_float and whole[name].is_float
                if whole[name].shape != partner.shape and whole[name].grows_into(partner)
            ]
            advice = "; give the base that the adapter was trained on"
            if len(cut) == len(wrong):
                advice = (
                    f": base's vocabulary was cut for the training ({cut[0]}); resize base to as many tokens, merge "
                    "the adapter with PEFT, and give the result as --aligned"
                )
            raise PairError(
                f"the adapter ({self.source.name}) does not fit base: shape or kind differs in "
                f"{count_of(len(wrong), 'tensor')} that it stores whole{advice}",
                wrong,
            )

    def _refuse_lone_embedding(self, whole: Tensors, copies: Tensors) -> None:
        if any(whole[record.name].shape != record.shape for record in copies.values()):
            raise PairError(
                f"the adapter ({self.source.name}) has an embedding with more rows but no output with as many, and "
                f"base ties the two, so the output that it was trained with is not known; {_MERGE}"
            )


def _is_bias(record: TensorRecord) -> bool:
    return record.name.endswith(".bias") and len(record.shape) == 1


def _advice(unknown: list[str], names: Collection[str], base: Checkpoint) -> str:
    """Return what to do about tensors that base lacks: it may be another model, or store the same one otherwise."""
    found = base_candidates(names, base.tensors, base.config)
    for name in unknown:
        others = found[name]
        if len(others) > 1:
            return f"several tensors of base could be meant by {name} ({' and '.join([*others][:3])}); {_MERGE}"
        if others:
            return (
                f"{name} would be {next(iter(others))} in base, which another name in the adapter means too; {_MERGE}"
            )
    if instead := stored_instead(unknown[0], base.tensors):
        module, names = instead
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return (
            f"base has {', '.join(names[:3])}{more} in {module}; if these are the same weights in another layout "
            f"(fused, split or stacked), {_MERGE}, otherwise give the base that the adapter was trained on"
        )
    if other := same_ending(unknown[0], base.tensors):
        return (
            f"if it is the same tensor as {other} in base, {_MERGE}, otherwise give the base that the adapter was "
            "trained on"
        )
    return "give the base that the adapter was trained on"


def _short(name: str) -> str:
    """Return the last part of a hub id or path, without what quantised copies of a base append for training."""
    return _QUANTISED_COPY.sub("", name.rsplit("/", 1)[-1].lower())


def _oriented(modules: tuple[LoraModule, ...], base: Checkpoint) -> list[LoraModule]:
    """Return the modules with ``inputs_first`` as base stores them.

    A base that stores its layers as (inputs, outputs), as GPT-2 does, stores all of them so but the output. The
    adapter's ``fan_in_fan_out`` cannot tell, because PEFT writes down that of the module that it reached last.
    """
    inputs_first = _stores_inputs_first(base)
    return [replace(module, inputs_first=inputs_first and not _names_output(module.name)) for module in modules]


def _stores_inputs_first(base: Checkpoint) -> bool:
    """Recognise such a base by a matrix that is not square and has a bias as long as its second size."""
    biases = {name: record.shape for name, record in base.tensors.items() if name.endswith(".bias")}
    return any(
        len(record.shape) == 2
        and record.shape[0] != record.shape[1]
        and biases.get(f"{name.removesuffix('.weight')}.bias") == record.shape[1:]
        for name, record in base.tensors.items()
    )


def _names_output(name: str) -> bool:
    return name.removesuffix(".weight").endswith(("lm_head", "embed_out"))


def _target(name: str, base: Checkpoint) -> str:
    """Return the tensor of base that a name means: an output that base does not store is its embedding."""
    if name in base.tensors or not _names_output(name):
        return name
    embeddings = [record.name for record in base.tensors.values() if is_embedding(record)]
    return embeddings[0] if len(embeddings) == 1 and may_tie_output(base.config) else name


def _beside_factors(adapted: Mapping[str, str], stored: Tensors, base: Checkpoint) -> list[str]:
    """Find the weights that the adapter stores beside their factors, as PEFT saves an adapted embedding or output.

    The product is added to these weights instead of to base's.

    Args:
        adapted: the tensors with factors, and base's tensor for each.
        stored: the tensors that the adapter stores whole, by base's names.
        base: gives the shape that such a weight must have.

    Returns:
        The names of such weights, in the order of ``adapted``.
    """
    return [
        name
        for name, target in adapted.items()
        if (record := stored.get(name)) and record.is_float and record.shape == base.tensors[target].shape
    ]


def _untied_output(whole: Tensors, base: Checkpoint) -> dict[str, TensorRecord]:
    """Return the output that a tied base gets if only its embedding was trained: a copy of base's embedding."""
    has_output = any(is_output(record) for record in (*base.tensors.values(), *whole.values()))
    trained = [base.tensors[name] for name, record in whole.items() if name in base.tensors and is_embedding(record)]
    if has_output or not trained or not may_tie_output(base.config):
        return {}
    name = "embed_out.weight" if "embed_in" in trained[0].name else "lm_head.weight"
    return {name: trained[0]}


def _tied_warnings(deltas: Mapping[str, LowRankTensorDelta], base: Checkpoint) -> tuple[str, ...]:
    """Warn that a tied base changes at both ends, as merging with PEFT does; a loaded adapter changes only one."""
    has_output = any(is_output(record) for record in base.tensors.values())
    ends = [name for name, delta in deltas.items() if is_embedding(delta.base)]
    if has_output or not ends or not may_tie_output(base.config):
        return ()
    return (
        f"base ties its output to its embedding: the adapter on it changes both ({ends[0]}), as merging with PEFT does",
    )


def _can_replace(whole: TensorRecord, base: TensorRecord) -> bool:
    """Return whether a whole tensor can take the place of base's: the same shape, or more rows of a vocabulary."""
    if not (whole.is_float and base.is_float and base.grows_into(whole)):
        return False
    return whole.shape == base.shape or any(is_embedding(record) or is_output(record) for record in (whole, base))


def _overrides(whole: Tensors, base: Checkpoint) -> JsonObject:
    """Return the keys of the config that the result changes: the size of a grown vocabulary, and an untied output."""
    overrides: JsonObject = {}
    rows = {
        record.shape[0]
        for name, record in whole.items()
        if (partner := base.tensors.get(name)) and is_embedding(partner) and record.shape[0] != partner.shape[0]
    }
    if rows and vocabulary_sizes(base.config):
        size: JsonObject = {"vocab_size": max(rows)}
        overrides.update(size if "vocab_size" in base.config else {"text_config": size})
    if any(is_output(record) and name not in base.tensors for name, record in whole.items()):
        overrides["tie_word_embeddings"] = False
    return overrides
