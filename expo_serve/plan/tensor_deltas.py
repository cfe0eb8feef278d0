"""How a delta gives one tensor of the aligned checkpoint: one small record for each delta format.

These are plain data, because a plan is data; :func:`expo_serve.load.fill.operands_of` makes from them the objects that
read and decode. To add a delta format, add its record to :data:`TensorDelta`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from expo_serve.checkpoint.records import Operand, TensorRecord, total_bytes
from expo_serve.plan.packed_format import TABLE_ENTRY, PackedTensor


@dataclass(frozen=True)
class FullTensorDelta:
    """The difference ``aligned - base``, stored as a tensor of base's shape."""

    record: TensorRecord
    base: TensorRecord
    operand: ClassVar[Operand] = "delta"
    overflow_is_result_error: ClassVar[bool] = False

    @property
    def fits(self) -> bool:
        """True if the delta can be added to base's tensor, or if both are integers, which stay base's."""
        same_kind = self.record.is_float == self.base.is_float
        return same_kind and (not self.base.is_float or self.record.shape == self.base.shape)

    @property
    def records(self) -> tuple[TensorRecord, ...]:
        """The stored tensors of the delta that are read."""
        return (self.record,)

    def read_bytes(self, used: Collection[Operand]) -> dict[str, int]:
        """Return the bytes that a load requests from storage for the whole tensor, by source."""
        return {"base": self.base.nbytes, "delta": self.record.nbytes if "delta" in used else 0}


@dataclass(frozen=True)
class LoraModule:
    """The factors of one module: the delta of its weight is ``scale * B A``."""

    name: str
    a: TensorRecord
    """Shape (rank, inputs), for convolutions (rank, inputs, ...)."""
    b: TensorRecord
    """Shape (outputs, rank), for convolutions (outputs, rank, 1, ...)."""
    scale: float
    is_embedding: bool
    """True for an embedding, whose weight is stored as (inputs, outputs): one row for each token."""
    inputs_first: bool = False
    """For square weights only: True if the layer stores (inputs, outputs), as GPT-2's Conv1D does. Other weights show
    it by their shape."""

    def orientation(self, weight: tuple[int, ...]) -> bool | None:
        """Return how the product fits a weight of this shape.

        Returns:
            True if the transposed product is to be added, False for the product as it is, None if neither fits.
        """
        inputs, outputs = math.prod(self.a.shape[1:]), self.b.shape[0]
        if math.prod(self.b.shape[2:]) != 1:
            return None
        if self.is_embedding:
            return True if weight == (inputs, outputs) else None
        plain = len(weight) >= 2 and weight[0] == outputs and math.prod(weight[1:]) == inputs
        transposed = weight == (inputs, outputs)
        if plain and transposed:
            return self.inputs_first
        return not plain if plain or transposed else None


@dataclass(frozen=True)
class LowRankTensorDelta:
    """The sum of ``scale * B A`` over the modules that share one tensor of base; a tied tensor can have several."""

    base: TensorRecord
    modules: tuple[LoraModule, ...]
    start: TensorRecord | None = None
    """A tensor that the adapter stores beside the factors, to which the product is added instead of to base's."""
    operand: ClassVar[Operand] = "delta"
    overflow_is_result_error: ClassVar[bool] = True

    @property
    def records(self) -> tuple[TensorRecord, ...]:
        """The stored tensors of the adapter that are read."""
        factors = tuple(record for module in self.modules for record in (module.a, module.b))
        return (*((self.start,) if self.start else ()), *factors)

    def read_bytes(self, used: Collection[Operand]) -> dict[str, int]:
        """Return the bytes that a load requests from storage for the whole tensor, by source."""
        return {"base": self.base.nbytes, "delta": total_bytes(self.records) if "delta" in used else 0}


@dataclass(frozen=True)
class PackedTensorDelta:
    """Packed blocks that decode to the aligned tensor."""

    record: TensorRecord
    """The packed bytes."""
    tensor: PackedTensor
    block: int
    """Number of values in a block."""
    base: TensorRecord | None
    """Base's tensor from which the values are predicted; None if they are stored as they are."""
    base_name: str
    """Name of the base that the delta was made against, for messages."""
    operand: ClassVar[Operand] = "aligned"
    overflow_is_result_error: ClassVar[bool] = False

    @property
    def records(self) -> tuple[TensorRecord, ...]:
        """The stored tensors of the delta that are read."""
        return (self.record,)

    def read_bytes(self, used: Collection[Operand]) -> dict[str, int]:
        """Return the bytes that a load requests from storage for the whole tensor, by source.

        Base is read at every alpha, because the values are predicted from it.
        """
        base = self.tensor.values_in_base * self.base.itemsize if self.base else 0
        table = TABLE_ENTRY.size * self.tensor.count(self.block)
        return {"base": base, "delta": self.record.nbytes if "aligned" in used or not self.base else table}


TensorDelta = FullTensorDelta | LowRankTensorDelta | PackedTensorDelta
"""``operand`` names what a delta supplies beside base. ``overflow_is_result_error`` is true if the delta is computed
(LoRA), so that an overflow in it means that alpha is too large, not that a file is damaged."""
