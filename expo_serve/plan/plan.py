"""The plan of a load, as data: what becomes of each tensor of the result. Reads no file and computes no value."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from expo_serve.checkpoint.folder import Checkpoint
from expo_serve.checkpoint.records import DITHERED_DTYPES, JsonObject, Operand, TensorRecord
from expo_serve.config import NEAREST, DoubtName, Rounding, Source, format_alpha
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
    """One tensor of the result."""

    aligned: TensorRecord
    """Name, shape and dtype of the tensor at alpha 0; without ``delta`` also where its bytes are stored."""
    base: TensorRecord | None
    """The tensor to extrapolate from; None if the result is ``aligned`` at every alpha."""
    alpha: float
    origin: Operand = "aligned"
    """The source to which the bytes of ``aligned`` belong."""
    delta: TensorDelta | None = None
    """How the delta gives the aligned tensor; None if ``aligned`` is stored as it is."""
    dtype: str = ""
    """Dtype of the result by the format's name, where it differs from that of ``aligned``; else empty."""
    rounding: Rounding = NEAREST

    @property
    def name(self) -> str:
        """The tensor's name in the aligned checkpoint."""
        return self.aligned.name

    @property
    def result(self) -> TensorRecord:
        """Name, shape and dtype of the result. The result is not stored: file and offset have no meaning."""
        return replace(self.aligned, dtype=self.dtype or self.aligned.dtype)

    @property
    def records(self) -> tuple[TensorRecord, ...]:
        """All stored tensors that may be read to compute the result."""
        aligned = () if self.delta else (self.aligned,)
        return (*((self.base,) if self.base else ()), *aligned, *(self.delta.records if self.delta else ()))

    def used(self, has_base: bool) -> tuple[Operand, ...]:
        """Return the operands of the elements that base has, or of those that base lacks."""
        return operands_used(has_base, self.alpha, self.delta.operand if self.delta else "aligned")

    def dither_key(self, used: tuple[Operand, ...]) -> int | None:
        """Return the key for dithered rounding of elements computed from these operands.

        None rounds to nearest: a result that is copied, or that is not in bf16 or fp16, is never dithered.
        """
        is_dithered = len(used) > 1 and self.result.dtype in DITHERED_DTYPES
        return self.rounding.key(self.name) if is_dithered else None

    @property
    def grown_rows(self) -> int:
        """Number of rows that only the aligned tensor has; they are copied."""
        return self.aligned.shape[0] - self.base.shape[0] if self.base and self.aligned.shape else 0

    @property
    def read_bytes(self) -> dict[str, int]:
        """Bytes that a load requests from storage for the whole tensor, by source."""
        used = self.used(self.base is not None)
        if self.delta:
            return self.delta.read_bytes(used)
        if self.base is None:
            return {"base": 0, self.origin: self.aligned.nbytes}
        new_rows = self.aligned.nbytes * self.grown_rows // max(1, *self.aligned.shape[:1]) if self.grown_rows else 0
        base_bytes = self.base.nbytes if "base" in used else 0
        return {"base": base_bytes, self.origin: self.aligned.nbytes if "aligned" in used else new_rows}


@dataclass(frozen=True, slots=True)
class Doubt:
    """A finding that most often means a wrong model: the name by which it is allowed, and one line for the user."""

    name: DoubtName
    message: str


class OpenedSource(Protocol):
    """A source whose headers are read and checked: a :class:`Checkpoint` or a delta."""

    @property
    def operand(self) -> Operand:
        """What the source is in the formula."""

    @property
    def source(self) -> Source:
        """The source's folder and version."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold its weights."""

    @property
    def tensors(self) -> dict[str, TensorRecord]:
        """All stored tensors, by their names in the files."""

    @property
    def nbytes(self) -> int:
        """Size of all stored tensors in bytes."""


@dataclass(frozen=True)
class Plan:
    """What a load will do."""

    base: Checkpoint
    aligned_or_delta: OpenedSource
    """The source beside base: the aligned checkpoint, or a delta."""
    model: Source
    """The source whose config and tensor names the result has; vLLM gets its folder as the model."""
    tensors: dict[str, PlannedTensor]
    """All tensors of the result by name, in the order in which they are stored."""
    copied_unmatched: tuple[str, ...] = ()
    """Tensors without a partner in base, which are copied."""
    ignored_base: tuple[str, ...] = ()
    """Tensors of base that the result does not have."""
    left_out: tuple[str, ...] = ()
    """Tensors of the aligned checkpoint that the result does not have, because no model of its kind can load them."""
    warnings: tuple[str, ...] = ()
    """One line each, for the user."""
    doubts: tuple[Doubt, ...] = ()
    """What has to be allowed; :func:`~expo_serve.plan.doubts.settle` looks at it."""
    unchanged: tuple[str, ...] = ()
    """Tensors that a delta does not name; they are base's at every alpha."""
    added: tuple[str, ...] = ()
    """Tensors of the result that the files of ``model`` do not have."""
    overrides: JsonObject = field(default_factory=dict)
    """Keys of the model's config that the result changes, with their new values."""
    tokenizer: Source | None = None
    """The source of the tokenizer, if it is not ``model``."""

    @property
    def sources(self) -> dict[Operand, Source]:
        """Both sources by operand, base first."""
        return {opened.operand: opened.source for opened in (self.base, self.aligned_or_delta)}

    @property
    def model_files(self) -> tuple[Path, ...]:
        """The files that hold the weights of ``model``."""
        return self.base.files if self.model == self.base.source else self.aligned_or_delta.files

    @property
    def extrapolated(self) -> list[PlannedTensor]:
        """The tensors that have a partner in base."""
        return [tensor for tensor in self.tensors.values() if tensor.base]

    @property
    def copied(self) -> list[PlannedTensor]:
        """The tensors that are the same at every alpha."""
        return [tensor for tensor in self.tensors.values() if not tensor.base]

    @property
    def grown(self) -> dict[str, int]:
        """Tensors with more rows than in base (a larger vocabulary): name to number of new rows."""
        return {tensor.name: tensor.grown_rows for tensor in self.extrapolated if tensor.grown_rows}

    @property
    def alphas(self) -> dict[str, int]:
        """Number of extrapolated tensors by alpha, written in its canonical form."""
        return dict(Counter(format_alpha(tensor.alpha) for tensor in self.extrapolated))

    @property
    def read_bytes(self) -> dict[str, int]:
        """Bytes that a load by one rank alone requests from storage, by source."""
        totals: Counter[str] = Counter(dict.fromkeys(self.sources, 0))
        for tensor in self.tensors.values():
            totals.update(tensor.read_bytes)
        return dict(totals)

    @property
    def weight_bytes(self) -> int:
        """Size of the result in bytes, in its own dtypes."""
        return sum(tensor.result.nbytes for tensor in self.tensors.values())
