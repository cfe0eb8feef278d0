"""A load as data: what becomes of each tensor of the result. No file is read and nothing is computed here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from expo_serve.checkpoint.folder import Checkpoint
from expo_serve.checkpoint.records import Operand, TensorRecord
from expo_serve.config import Source, format_alpha
from expo_serve.plan.tensor_deltas import TensorDelta


def operands_used(has_base: bool, alpha: float, partner: Operand = "aligned") -> tuple[Operand, ...]:
    """Decide which operands a result is computed from: the rule of alpha 0 and -1.

    At alpha 0 the aligned tensor's bits are copied, at alpha -1 those of base, without arithmetic: ``lerp`` alone would
    flip the sign of -0.0 there and could overflow. With a delta, alpha 0 is ``base + delta`` and has to be computed.

    Args:
        has_base: False for elements that base lacks (a tensor of its own, or new rows of a vocabulary).
        alpha: the extrapolation factor, finite.
        partner: the operand beside base, ``aligned`` or ``delta``.

    Returns:
        Both operands, ``base`` first, or the one whose bits are copied.
    """
    if not has_base:
        return ("aligned",)
    if alpha == -1:
        return ("base",)
    return ("aligned",) if alpha == 0 and partner == "aligned" else ("base", partner)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the result. Without ``base`` it is taken over."""

    aligned: TensorRecord
    """Its name, shape and dtype; without a change also where it lies at alpha 0."""
    base: TensorRecord | None
    alpha: float
    origin: Operand = "aligned"
    """Of which source the bytes of ``aligned`` are."""
    delta: TensorDelta | None = None
    """How a delta comes from base to aligned."""
    dtype: str = ""
    """What the result is rounded to, where it is not the dtype of ``aligned``; by the format's own name."""

    @property
    def name(self) -> str:
        """The aligned side's name."""
        return self.aligned.name

    @property
    def result(self) -> TensorRecord:
        """What it becomes: name, shape and dtype. It lies nowhere."""
        return replace(self.aligned, dtype=self.dtype or self.aligned.dtype)

    @property
    def records(self) -> tuple[TensorRecord, ...]:
        """All that may be read for it."""
        aligned = () if self.delta else (self.aligned,)
        return (*((self.base,) if self.base else ()), *aligned, *(self.delta.records if self.delta else ()))

    def used(self, has_base: bool) -> tuple[Operand, ...]:
        """The operands of the elements that base has, or of those that it lacks."""
        return operands_used(has_base, self.alpha, self.delta.operand if self.delta else "aligned")

    @property
    def grown_rows(self) -> int:
        """Rows that only the aligned side has; they are taken over."""
        return self.aligned.shape[0] - self.base.shape[0] if self.base and self.aligned.shape else 0

    @property
    def read_bytes(self) -> dict[str, int]:
        """Bytes that a load asks of storage for the whole tensor, by source."""
        used = self.used(self.base is not None)
        if self.delta:
            return self.delta.read_bytes(used)
        if self.base is None:
            return {"base": 0, self.origin: self.aligned.nbytes}
        new_rows = self.aligned.nbytes * self.grown_rows // max(1, *self.aligned.shape[:1]) if self.grown_rows else 0
        base_bytes = self.base.nbytes if "base" in used else 0
        return {"base": base_bytes, self.origin: self.aligned.nbytes if "aligned" in used else new_rows}


class OpenedSource(Protocol):
    """What stands beside base. :class:`Checkpoint` is one; so is every delta."""

    @property
    def operand(self) -> Operand:
        """``aligned`` or ``delta``."""

    @property
    def source(self) -> Source:
        """Where it lies."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files with its weights."""

    @property
    def tensors(self) -> dict[str, TensorRecord]:
        """What the files hold, by name there."""

    @property
    def nbytes(self) -> int:
        """Bytes of all that."""


@dataclass(frozen=True)
class Plan:
    """What a load will do, tensor by tensor, in the order in which they are stored."""

    base: Checkpoint
    aligned_or_delta: OpenedSource
    """What stands beside base: the aligned checkpoint, or a delta."""
    model: Source
    """Whose config and names of tensors the result has; the folder that vLLM takes for the model."""
    tensors: dict[str, PlannedTensor]
    copied_unmatched: tuple[str, ...]
    ignored_base: tuple[str, ...]
    left_out: tuple[str, ...]
    """Tensors of the aligned side that no model of its kind can load, and that the result does not have."""
    warnings: tuple[str, ...]
    unchanged: tuple[str, ...] = ()
    """Tensors that a delta does not name: they are base's."""
    added: tuple[str, ...] = ()
    """Tensors that the files of ``model`` do not have."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """What the result's config says otherwise than the model's."""
    tokenizer: Source | None = None
    """Where the tokenizer comes from, if not from ``model``."""

    @property
    def sources(self) -> dict[str, Source]:
        """Base and what stands beside it, by side."""
        return {opened.operand: opened.source for opened in (self.base, self.aligned_or_delta)}

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
        totals: Counter[str] = Counter(dict.fromkeys(self.sources, 0))
        for tensor in self.tensors.values():
            totals.update(tensor.read_bytes)
        return dict(totals)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the result, in its own dtypes."""
        return sum(tensor.result.nbytes for tensor in self.tensors.values())
