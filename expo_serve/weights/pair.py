"""Base and aligned made comparable: for each tensor of the aligned side, what becomes of it.

All refusals but one (values that are not finite) happen here, from headers alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

from expo_serve.config import ExpoConfig, format_alpha
from expo_serve.errors import PairError, UsageError
from expo_serve.weights.checkpoint import Checkpoint
from expo_serve.weights.header import TensorRecord

# Field-wide names of the input embedding and of the output projection that may be tied to it.
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embeddings?|shared)\.weight$")
_OUTPUT = re.compile(r"(^|\.)(lm_head|embed_out|output|head)\.(weight|bias)$")
# Buffers that old checkpoints carry along and no model loads.
_LEFTOVER = re.compile(r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|\.masked_bias|\.rotary_emb\..*|position_ids)$")


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the result. Without ``base`` it is taken over from the aligned side."""

    aligned: TensorRecord
    base: TensorRecord | None
    alpha: float

    @property
    def name(self) -> str:
        """The aligned side's name."""
        return self.aligned.name

    @property
    def grown_rows(self) -> int:
        """Rows that only the aligned side has; they are taken over."""
        return self.aligned.shape[0] - self.base.shape[0] if self.base and self.aligned.shape else 0

    @property
    def read_bytes(self) -> dict[str, int]:
        """Bytes that the load asks of each side: at alpha 0 nothing of base, at alpha -1 of aligned
        its new rows only."""
        if self.base is None or self.alpha == 0:
            return {"base": 0, "aligned": self.aligned.nbytes}
        new = self.aligned.nbytes * self.grown_rows // max(self.aligned.shape[0], 1) if self.aligned.shape else 0
        return {"base": self.base.nbytes, "aligned": new if self.alpha == -1 else self.aligned.nbytes}


@dataclass(frozen=True)
class Plan:
    """What a load will do, tensor by tensor, in the aligned side's order."""

    base: Checkpoint
    aligned: Checkpoint
    tensors: dict[str, PlannedTensor]
    copied_unmatched: tuple[str, ...]
    ignored_base: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def extrapolated(self) -> list[PlannedTensor]:
        """The tensors that have both sides."""
        return [tensor for tensor in self.tensors.values() if tensor.base]

    @property
    def copied(self) -> list[PlannedTensor]:
        """The tensors that are taken over from the aligned side."""
        return [tensor for tensor in self.tensors.values() if not tensor.base]

    @property
    def grown(self) -> dict[str, int]:
        """Tensors with a larger vocabulary on the aligned side, and by how many rows."""
        return {tensor.name: tensor.grown_rows for tensor in self.extrapolated if tensor.grown_rows}

    @property
    def alphas(self) -> dict[str, int]:
        """How many extrapolated tensors get which alpha (its text)."""
        return dict(Counter(format_alpha(tensor.alpha) for tensor in self.extrapolated))

    @property
    def read_bytes(self) -> dict[str, int]:
        """Bytes that one rank alone asks of each side."""
        totals: Counter[str] = Counter(base=0, aligned=0)
        for tensor in self.tensors.values():
            totals.update(tensor.read_bytes)
        return dict(totals)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the result, in the aligned side's dtypes."""
        return self.aligned.nbytes


def plan_pair(base: Checkpoint, aligned: Checkpoint, config: ExpoConfig) -> Plan:
    """Decide for every tensor, or refuse the pair.

    Raises:
        PairError: other architectures, shapes or tensors than a pair has; the first ten are named.
        UsageError: an alpha rule that matches no tensor.
    """
    _check_architecture(base, aligned)
    partners = {name: _partner(record, base) for name, record in aligned.tensors.items()}
    used = {partner.name for partner in partners.values() if partner}
    only_base = [name for name in base.tensors if name not in used and not _is_redundant(name, base, aligned)]
    only_aligned = [
        name
        for name, partner in partners.items()
        if partner is None and aligned.tensors[name].is_float and not _LEFTOVER.search(name)
    ]
    _refuse_shapes(base, aligned, partners)
    if config.unmatched == "refuse":
        _refuse_one_sided(base, aligned, only_base, only_aligned)
    tensors = {
        name: PlannedTensor(record, partners[name], config.alpha_for(name)) for name, record in aligned.tensors.items()
    }
    _check_rules(config, tensors)
    plan = Plan(base, aligned, tensors, tuple(only_aligned), tuple(only_base), ())
    return Plan(**{**plan.__dict__, "warnings": tuple(_warnings(plan))})


def _check_architecture(base: Checkpoint, aligned: Checkpoint) -> None:
    for key in ("model_type", "architectures"):
        ours, theirs = base.config.get(key), aligned.config.get(key)
        if ours != theirs:
            raise PairError(
                f"base and aligned have different architectures: {key} is {ours!r} in base "
                f"({base.source.name}), {theirs!r} in aligned ({aligned.source.name})"
            )


def _partner(record: TensorRecord, base: Checkpoint) -> TensorRecord | None:
    """The base side's tensor for one of the aligned side; integers and leftovers have none: they are copied."""
    if not record.is_float or _LEFTOVER.search(record.name):
        return None
    found = base.tensors.get(record.name)
    if found is None and _OUTPUT.search(record.name) and base.config.get("tie_word_embeddings") is not False:
        found = _embedding(base, record.shape)
    return found


def _embedding(checkpoint: Checkpoint, like: tuple[int, ...]) -> TensorRecord | None:
    """The input embedding that stands in for a tied output of shape ``like``, if there is just one."""
    found = [
        record
        for record in checkpoint.tensors.values()
        if _EMBEDDING.search(record.name) and len(record.shape) == 2 and record.shape[1:] == like[1:]
    ]
    return found[0] if len(found) == 1 else None


def _is_redundant(name: str, base: Checkpoint, aligned: Checkpoint) -> bool:
    """Whether a tensor that only base has carries nothing: a leftover, an integer buffer, a tied output."""
    record = base.tensors[name]
    tied_output = (
        _OUTPUT.search(name) is not None
        and name not in aligned.tensors
        and base.config.get("tie_word_embeddings") is not False
        and aligned.config.get("tie_word_embeddings") is not False
        and _embedding(base, record.shape) is not None
    )
    return tied_output or not record.is_float or _LEFTOVER.search(name) is not None


def _vocabulary_sizes(config: dict[str, Any]) -> set[int]:
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    return {part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)}


def _fits(base: TensorRecord, aligned: TensorRecord, grown: set[tuple[int, int]]) -> bool:
    """Whether two tensors have one shape, but for the rows of a vocabulary (``grown``: its sizes on both sides)."""
    if base.shape == aligned.shape:
        return True
    if len(base.shape) != len(aligned.shape) or not base.shape or base.shape[1:] != aligned.shape[1:]:
        return False
    of_vocabulary = bool(_EMBEDDING.search(aligned.name) or _OUTPUT.search(aligned.name))
    rows = (base.shape[0], aligned.shape[0])
    return rows[0] < rows[1] and (of_vocabulary or rows in grown)


def _refuse_shapes(base: Checkpoint, aligned: Checkpoint, partners: dict[str, TensorRecord | None]) -> None:
    grown = set(product(_vocabulary_sizes(base.config), _vocabulary_sizes(aligned.config)))
    both = ((name, partners[name] or base.tensors.get(name)) for name in partners if not _LEFTOVER.search(name))
    wrong = [
        f"{name}: base {_describe(partner)}, aligned {_describe(aligned.tensors[name])}"
        for name, partner in both
        if partner and not _are_alike(partner, aligned.tensors[name], grown)
    ]
    if wrong:
        raise PairError(
            f"base and aligned are not a pair: {len(wrong)} of {len(partners)} tensors differ in shape or kind"
            f"{_size_differences(base, aligned)}; give two checkpoints of one model",
            wrong,
        )


def _are_alike(base: TensorRecord, aligned: TensorRecord, grown: set[tuple[int, int]]) -> bool:
    """Whether the two can be extrapolated; of integers, which are copied, only that both sides have some."""
    return base.is_float == aligned.is_float and (not aligned.is_float or _fits(base, aligned, grown))


def _describe(record: TensorRecord) -> str:
    return f"{record.dtype} {list(record.shape)}"


def _size_differences(base: Checkpoint, aligned: Checkpoint) -> str:
    keys = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    pairs = ((key, base.config.get(key), aligned.config.get(key)) for key in keys)
    texts = [f"{key} {ours} against {theirs}" for key, ours, theirs in pairs if ours != theirs]
    return f" ({', '.join(texts)})" if texts else ""


def _refuse_one_sided(base: Checkpoint, aligned: Checkpoint, only_base: list[str], only_aligned: list[str]) -> None:
    total = len(only_base) + len(only_aligned)
    if not total:
        return
    details = [f"only in aligned: {name} {list(aligned.tensors[name].shape)}" for name in only_aligned]
    details += [f"only in base: {name} {list(base.tensors[name].shape)}" for name in only_base]
    raise PairError(
        f"{total} tensors are on one side only ({len(only_aligned)} in aligned, {len(only_base)} in base)"
        f"{_size_differences(base, aligned)}; --unmatched copy takes those of aligned over and ignores "
        "those of base",
        details,
    )


def _check_rules(config: ExpoConfig, names: Iterable[str]) -> None:
    for rule in config.alpha_rules:
        if not any(rule.matches(name) for name in names):
            raise UsageError(f"alpha rule {rule.text!r} matches no tensor of the aligned checkpoint")


def _warnings(plan: Plan) -> Iterable[str]:
    if grown := plan.grown:
        names = ", ".join(f"{name} (+{rows} rows)" for name, rows in grown.items())
        yield f"aligned has a larger vocabulary than base: new rows are taken over from aligned: {names}"
    if plan.copied_unmatched or plan.ignored_base:
        yield (
            f"--unmatched copy: {len(plan.copied_unmatched)} tensors that only aligned has are taken over, "
            f"{len(plan.ignored_base)} that only base has are ignored"
        )
