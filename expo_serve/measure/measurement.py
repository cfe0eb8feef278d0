"""The result of ``expo-serve inspect --measure``, as data. Imports neither torch nor NumPy."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from expo_serve.config import Method
from expo_serve.measure.groups import Group

Kind = Literal["same", "alignment", "retrained", "unrelated"]


class MeasuredPart(BaseModel):
    """What base and aligned differ by in some tensors, and what rounding leaves of alpha there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensors: int
    values: int
    """Number of values that both sides have."""
    share_unchanged: float
    """Share of values that are the same on both sides."""
    units: dict[str, float]
    """Shares of values that are 1, 2, 3 or 4, and more units in the last place apart."""
    step: float | None
    """Size of the step: ``||aligned - base|| / ||aligned||``; None where aligned is zero."""
    effective_alpha: dict[Method, float | None]
    """By rounding: what arrives of alpha; None where nothing changed, a mixture where rules give several alphas."""


class MeasuredGroup(MeasuredPart):
    """One group of tensors."""

    group: Group


class MeasuredLayer(MeasuredPart):
    """One layer."""

    layer: int


class Verdict(BaseModel):
    """Whether this is a pair for ExPO."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    text: str
    """One or two sentences, with the numbers behind them."""
    remarks: list[str] = []
    """What else is to be known, one line each."""


class Measurement(BaseModel):
    """The whole result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    effective_alpha: dict[Method, float | None]
    """By rounding, of the tensors under ``--alpha``; None where nothing changed."""
    effective_alphas: dict[str, dict[Method, float | None]]
    """The same for each alpha that rules give, by its canonical form."""
    total: MeasuredPart
    groups: list[MeasuredGroup]
    layers: list[MeasuredLayer]
    verdict: Verdict
