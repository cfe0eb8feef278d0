"""Base and aligned made comparable: for each tensor of the aligned side, what becomes of it.

All refusals but one (values that are not finite) happen here, from headers alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from expo_serve.config import ExpoConfig, format_alpha
from expo_serve.errors import UsageError
from expo_serve.weights.checkpoint import Checkpoint
from expo_serve.weights.header import TensorRecord
from expo_serve.weights.matching import Matching, match
from expo_serve.weights.refusals import refuse_architectures, refuse_tensors


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
    left_out: tuple[str, ...]
    """Tensors of the aligned side that no model of its kind can load, and that the result does not have."""
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
    refuse_architectures(base, aligned)
    matching = match(base, aligned)
    refuse_tensors(base, aligned, matching, config)
    _check_rules(config, aligned.tensors)
    tensors = {
        name: PlannedTensor(aligned.tensors[name], partner, config.alpha_for(name))
        for name, partner in matching.partners.items()
    }
    ignored = tuple(record.name for record in matching.only_base.values())
    copied = (*matching.only_aligned, *(matching.spare if config.unmatched == "copy" else ()))
    plan = Plan(base, aligned, tensors, copied, ignored, matching.left_out, ())
    return replace(plan, warnings=tuple(_warnings(plan, matching)))


def _check_rules(config: ExpoConfig, names: Iterable[str]) -> None:
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
        yield f"a value head is left out, since a model that generates text cannot load it: {', '.join(plan.left_out)}"
    if plan.copied_unmatched or plan.ignored_base:
        yield (
            f"--unmatched copy: {len(plan.copied_unmatched)} tensors that only aligned has are taken over, "
            f"{len(plan.ignored_base)} that only base has are ignored"
        )
