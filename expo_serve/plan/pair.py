"""Base and aligned made comparable: for each tensor of the aligned side, what becomes of it.

All refusals but one (values that are not finite) happen here, from headers alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from expo_serve.checkpoint.folder import Checkpoint
from expo_serve.checkpoint.header import TensorRecord
from expo_serve.config import ExpoConfig, Source, format_alpha
from expo_serve.errors import UsageError
from expo_serve.plan.matching import Matching, match
from expo_serve.plan.refusals import refuse_architectures, refuse_tensors

Side = Literal["base", "aligned", "delta"]


def sides_used(has_base: bool, alpha: float, other: Side = "aligned") -> tuple[Side, ...]:
    """What is read for a result: both sides, ``base`` first, or the one whose bits are copied.

    Args:
        has_base: whether there is a base tensor to go on from.
        alpha: how far.
        other: what stands beside base: ``aligned`` or ``delta``.
    """
    if not has_base:
        return ("aligned",)
    if alpha == -1:
        return ("base",)
    return ("aligned",) if alpha == 0 and other == "aligned" else ("base", other)


class Change(Protocol):
    """What a delta says of one tensor. Records and numbers only: a plan travels to other processes."""

    @property
    def other(self) -> Side:
        """What its sides give beside base: ``delta``, or ``aligned`` where it decodes to that."""

    @property
    def is_computed(self) -> bool:
        """Whether a step that is not finite comes of values that are."""

    @property
    def records(self) -> tuple[TensorRecord, ...]:
        """What is read of the delta."""

    def read_bytes(self, alpha: float) -> dict[str, int]:
        """Bytes that a load asks of storage for the whole tensor, by source."""

    def sides(self, planned: PlannedTensor, reader: Any, used: tuple[Side, ...]) -> Any:
        """The :class:`~expo_serve.load.operands.Sides` of a planned tensor that has this change."""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the result. Without ``base`` it is taken over."""

    aligned: TensorRecord
    """Its name, shape and dtype; without a change also where it lies at alpha 0."""
    base: TensorRecord | None
    alpha: float
    origin: str = "aligned"
    """Of which source the bytes of ``aligned`` are."""
    change: Change | None = None
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
        aligned = () if self.change else (self.aligned,)
        return (*((self.base,) if self.base else ()), *aligned, *(self.change.records if self.change else ()))

    def used(self, has_base: bool) -> tuple[Side, ...]:
        """The sides that are read, for elements that base has or has not."""
        return sides_used(has_base, self.alpha, self.change.other if self.change else "aligned")

    @property
    def grown_rows(self) -> int:
        """Rows that only the aligned side has; they are taken over."""
        return self.aligned.shape[0] - self.base.shape[0] if self.base and self.aligned.shape else 0

    @property
    def read_bytes(self) -> dict[str, int]:
        """Bytes that the load asks of each source: at alpha 0 nothing of base, at alpha -1 of aligned
        its new rows only."""
        if self.change:
            return self.change.read_bytes(self.alpha)
        if self.base is None or self.alpha == 0:
            return {"base": 0, self.origin: self.aligned.nbytes}
        new = self.aligned.nbytes * self.grown_rows // max(self.aligned.shape[0], 1) if self.aligned.shape else 0
        return {"base": self.base.nbytes, self.origin: new if self.alpha == -1 else self.aligned.nbytes}


class OtherSide(Protocol):
    """What stands beside base. :class:`Checkpoint` is one; so is every delta."""

    @property
    def side(self) -> str:
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
    other: OtherSide
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
        return {side.side: side.source for side in (self.base, self.other)}

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


def plan_pair(base: Checkpoint, aligned: Checkpoint, config: ExpoConfig) -> Plan:
    """Decide for every tensor, or refuse the pair.

    Raises:
        PairError: other architectures, shapes or tensors than a pair has; the first ten are named.
        UsageError: an alpha rule that matches no tensor.
    """
    refuse_architectures(base, aligned)
    matching = match(base, aligned)
    refuse_tensors(base, aligned, matching, config)
    check_rules(config, aligned.tensors)
    tensors = {
        name: PlannedTensor(aligned.tensors[name], partner, config.alpha_for(name))
        for name, partner in matching.partners.items()
    }
    ignored = tuple(record.name for record in matching.only_base.values())
    copied = (*matching.only_aligned, *(matching.spare if config.unmatched == "copy" else ()))
    plan = Plan(base, aligned, aligned.source, tensors, copied, ignored, matching.left_out, ())
    return replace(plan, warnings=tuple(_warnings(plan, matching)))


def check_rules(config: ExpoConfig, names: Iterable[str]) -> None:
    """Every alpha rule must match a tensor.

    Raises:
        UsageError: one matches none.
    """
    for rule in config.alpha_rules:
        if not any(rule.matches(name) for name in names):
            raise UsageError(f"alpha rule {rule.text!r} matches no tensor of the aligned checkpoint")


def _warnings(plan: Plan, matching: Matching) -> Iterable[str]:
    if grown := plan.grown:
        names = ", ".join(f"{name} (+{rows} rows)" for name, rows in grown.items())
        yield f"aligned has a larger vocabulary than base: new rows are taken over from aligned: {names}"
    if matching.spare:
        yield (
            f"only aligned has multi-token prediction layers ({len(matching.spare)} tensors): they are not "
            "extrapolated; the model itself does not load them"
        )
    if plan.left_out:
        yield value_head_warning(plan.left_out)
    if plan.copied_unmatched or plan.ignored_base:
        yield (
            f"--unmatched copy: {len(plan.copied_unmatched)} tensors that only aligned has are taken over, "
            f"{len(plan.ignored_base)} that only base has are ignored"
        )


def value_head_warning(names: tuple[str, ...]) -> str:
    """Says which tensors of a value head the result does not have."""
    return f"a value head is left out, since a model that generates text cannot load it: {', '.join(names)}"
