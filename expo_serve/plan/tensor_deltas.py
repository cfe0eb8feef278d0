"""How a delta takes one tensor from base to aligned: one small record for each delta format.

Records and numbers only, since a plan travels to other processes. What reads a delta is made from these on the load
side (:mod:`expo_serve.load.operands`).
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
    """``aligned - base``, stored as a tensor."""

    record: TensorRecord
    base: TensorRecord
    operand: ClassVar[Operand] = "delta"
    overflow_is_result_error: ClassVar[bool] = False

    @property
    def fits(self) -> bool:
        """True if it can be added to base's tensor; integers stay base's, so nothing is asked of them."""
        are_numbers = self.record.is_float == self.base.is_float
        return are_numbers and (not self.base.is_float or self.record.shape == self.base.shape)

    @property
    def records(self) -> tuple[TensorRecord, ...]:
        """The tensors of the delta's files that are read."""
        return (self.record,)

    def read_bytes(self, used: Collection[Operand]) -> dict[str, int]:
        """Bytes that a load asks of storage for the whole tensor, by source."""
        return {"base": self.base.nbytes, "delta": self.record.nbytes if "delta" in used else 0}


@dataclass(frozen=True)
class LoraModule:
    """The two factors of one module's step: ``scale * B A``."""

    name: str
    a: TensorRecord
    b: TensorRecord
    scale: float
    is_embedding: bool
    inputs_first: bool = False
    """Whether a square weight is stored so; of others their shape says it."""

    def orientation(self, weight: tuple[int, ...]) -> bool | None:
        """Whether a weight of this shape is changed by the transposed product; None where it does not fit."""
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
    """``scale * B A`` of one module, or of several modules that share a tied tensor."""

    base: TensorRecord
    modules: tuple[LoraModule, ...]
    start: TensorRecord | None = None
    """What the product is added to where the adapter stores that too; most often base's own tensor."""
    operand: ClassVar[Operand] = "delta"
    overflow_is_result_error: ClassVar[bool] = True

    @property
    def records(self) -> tuple[TensorRecord, ...]:
        """The tensors of the adapter's file that are read."""
        factors = tuple(record for module in self.modules for record in (module.a, module.b))
        return (*((self.start,) if self.start else ()), *factors)

    def read_bytes(self, used: Collection[Operand]) -> dict[str, int]:
        """Bytes that a load asks of storage for the whole tensor, by source."""
        return {"base": self.base.nbytes, "delta": total_bytes(self.records) if "delta" in used else 0}


@dataclass(frozen=True)
class PackedTensorDelta:
    """Packed bytes that decode to the aligned tensor."""

    record: TensorRecord
    tensor: PackedTensor
    block: int
    base: TensorRecord | None
    """The tensor from which the values are predicted."""
    base_name: str
    operand: ClassVar[Operand] = "aligned"
    overflow_is_result_error: ClassVar[bool] = False

    @property
    def records(self) -> tuple[TensorRecord, ...]:
        """The tensors of the delta's files that are read."""
        return (self.record,)

    def read_bytes(self, used: Collection[Operand]) -> dict[str, int]:
        """Bytes that a load asks of storage, by source. Base is read at every alpha: it predicts the values."""
        base = self.tensor.values_in_base * self.base.itemsize if self.base else 0
        table = TABLE_ENTRY.size * self.tensor.count(self.block)
        return {"base": base, "delta": self.record.nbytes if "aligned" in used or not self.base else table}


TensorDelta = FullTensorDelta | LowRankTensorDelta | PackedTensorDelta
"""``operand`` names what a delta supplies beside base. ``overflow_is_result_error`` is true if the delta is the result
of arithmetic (LoRA), so that an overflow in it means that alpha is too large, not that a file is damaged."""
