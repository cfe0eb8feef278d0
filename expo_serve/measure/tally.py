"""Counts and sums over values: what two tensors differ by, and what rounding leaves of the step between them.

ExPO moves a tensor by ``alpha * step``, where ``step`` is ``aligned - base`` or a delta. What arrives, ``result -
aligned``, is compared with that by projection: ``effective alpha = sum((result - aligned) * step) / sum(step ** 2)``,
which is alpha itself where nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from expo_serve import kernels
from expo_serve.checkpoint.records import Operand
from expo_serve.config import Method
from expo_serve.load import sizes
from expo_serve.load.dtypes import Bits, signed_bits, uint16_bits
from expo_serve.load.formula import combine_unchecked
from expo_serve.load.operands import RecordOperands
from expo_serve.load.selection import Selection

UNITS = ("0", "1", "2", "3-4", "more")
"""Kinds of values, by their distance in units in the last place."""
_PIECE = 1 << 16
"""Values whose sums torch keeps in fp32."""


@dataclass
class Tally:
    """Counts and sums; tallies of parts can be added."""

    units: list[int] = field(default_factory=lambda: [0] * len(UNITS))
    """Number of values by their distance from base, see :data:`UNITS`; counted only where both sides have one dtype."""
    aligned_squares: float = 0.0
    """Sum of the squares of aligned."""
    step_squares: float = 0.0
    """Sum of the squares of the step."""
    moved: dict[Method, float] = field(default_factory=lambda: {"nearest": 0.0, "dithered": 0.0})
    """By rounding: sum of the products of the step and what the result differs from aligned by."""

    @classmethod
    def of_loop(cls, counts: npt.NDArray[np.int64], sums: npt.NDArray[np.float64]) -> Tally:
        """Return what :func:`expo_serve.kernels.measuring.tally` has counted and added up."""
        size, step, nearest, dithered = sums.tolist()
        return cls(counts.tolist(), size, step, {"nearest": nearest, "dithered": dithered})

    def add(self, other: Tally) -> None:
        """Add another tally."""
        self.units = [one + two for one, two in zip(self.units, other.units, strict=True)]
        self.aligned_squares += other.aligned_squares
        self.step_squares += other.step_squares
        for method, moved in other.moved.items():
            self.moved[method] += moved

    def effective_alpha(self, method: Method) -> float | None:
        """Return the effective alpha under a rounding; None where base and aligned are the same."""
        return self.moved[method] / self.step_squares if self.step_squares else None


def tally(
    operands: Mapping[Operand, torch.Tensor],
    dtype: torch.dtype,
    alpha: float,
    noise: torch.Tensor | None,
    only: Method | None = None,
) -> Tally:
    """Count and add up what the operands differ by and what their combination moves.

    Args:
        operands: base, and aligned or a delta, of one shape, on the CPU.
        dtype: what results are rounded to.
        alpha: the extrapolation factor.
        noise: the random bits of the values, see :func:`~expo_serve.load.dither.noise`; without them dithered rounding
            counts as rounding to nearest, as it does for results in fp32 and fp64.
        only: the one rounding that is wanted: ``units`` and the other rounding may stay 0, where torch has to count.
    """
    base, other = operands["base"], operands["delta" if "delta" in operands else "aligned"]
    is_plain = all(side.dtype == torch.bfloat16 and side.is_contiguous() for side in (base, other))
    if "aligned" in operands and dtype == torch.bfloat16 and is_plain and kernels.available("measuring.tally"):
        return _by_loop(base, other, alpha, noise)
    total = Tally()
    flat = [torch.split(side.reshape(-1), _PIECE) for side in (base, other)]
    random = torch.split(noise.reshape(-1), _PIECE) if noise is not None else [None] * len(flat[0])
    for one, two, bits in zip(*flat, random, strict=True):
        total.add(_of_piece(one, two, "delta" in operands, dtype, alpha, bits, only))
    return total


def projection(result: torch.Tensor, operands: Mapping[Operand, torch.Tensor]) -> torch.Tensor:
    """Compute what rounding leaves of the step, on whatever device.

    Args:
        result: what has been computed.
        operands: of the same shape, on the same device.

    Returns:
        Two values in fp64: the sum of the products of the step and what the result differs from aligned by, and the
        step's sum of squares.
    """
    aligned, step = _aligned_and_step(operands)
    return torch.stack([torch.sum((result.double() - aligned) * step), torch.sum(step * step)])


def tally_stored(
    operands: RecordOperands, elements: Selection, dtype: torch.dtype, alpha: float, key: int
) -> tuple[Tally, int]:
    """Tally contiguous elements of two bf16 tensors without coming back to Python for each piece.

    Args:
        operands: base and aligned.
        elements: which.
        dtype: what results are rounded to.
        alpha: the extrapolation factor.
        key: the tensor's key for dithered rounding.

    Returns:
        The tally of the first elements, and how many they are: 0 for other dtypes or without the compiled loop, and
        fewer than all where a read failed. :func:`tally` does the rest, and reading that reports the cause.
    """
    records = operands.records
    is_plain = dtype == torch.bfloat16 and {record.dtype for record in records.values()} == {"BF16"}
    if not is_plain or "aligned" not in records or not kernels.available("measuring.stream"):
        return Tally(), 0
    from expo_serve.kernels import measuring
    from expo_serve.kernels.bf16 import lerp_factor

    reader = operands.reader
    one, two = (reader.span_of(side, records[side], elements) for side in ("base", "aligned"))
    room = sizes.MEASURED_PIECE_BYTES
    memory = [reader.buffer(side, room).array[:room].view(np.uint16) for side in ("base", "aligned")]
    counts, sums = np.zeros(len(UNITS), np.int64), np.zeros(4)
    with reader.activity.during(one.path, two.path):
        done = measuring.stream(
            one.descriptor, one.offset, two.descriptor, two.offset, memory[0], memory[1], elements.numel,
            *lerp_factor(1 + alpha), key, elements.offset, counts, sums,
        )  # fmt: skip
    reader.activity.add_bytes(2 * done * dtype.itemsize)
    return Tally.of_loop(counts, sums), done


def _by_loop(base: torch.Tensor, aligned: torch.Tensor, alpha: float, noise: torch.Tensor | None) -> Tally:
    from expo_serve.kernels import measuring
    from expo_serve.kernels.bf16 import lerp_factor

    one, two = uint16_bits(base), uint16_bits(aligned)
    random = one[:0] if noise is None else uint16_bits(noise.contiguous())
    counts, sums = np.zeros(len(UNITS), np.int64), np.zeros(4)
    measuring.tally(one, two, *lerp_factor(1 + alpha), random, counts, sums)
    found = Tally.of_loop(counts, sums)
    if noise is None:
        found.moved["dithered"] = found.moved["nearest"]
    return found


def _of_piece(
    base: torch.Tensor,
    other: torch.Tensor,
    is_delta: bool,
    dtype: torch.dtype,
    alpha: float,
    noise: torch.Tensor | None,
    only: Method | None,
) -> Tally:
    names: tuple[Operand, Operand] = ("base", "delta" if is_delta else "aligned")
    operands = dict(zip(names, (base, other), strict=True))
    aligned, step = _aligned_and_step(operands)
    found = Tally(step_squares=float(torch.dot(step, step)))
    methods: dict[Method, torch.Tensor | None] = {"nearest": None, "dithered": noise}
    for method in (only,) if only else methods:
        if method == "dithered" and noise is None and not only:
            found.moved[method] = found.moved["nearest"]
            continue
        result = combine_unchecked(
            torch.empty(base.shape, dtype=dtype, device="cpu"), operands, dtype, alpha, methods[method]
        )
        found.moved[method] = float(torch.dot(result.double() - aligned, step))
    if not only:
        found.aligned_squares = float(torch.dot(aligned, aligned))
        found.units = _units(base.to(dtype), aligned.to(dtype))
    return found


def _aligned_and_step(operands: Mapping[Operand, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both in fp64."""
    start = operands["base"].double()
    step = operands["delta"].double() if "delta" in operands else operands["aligned"].double() - start
    return start + step, step


def _units(base: torch.Tensor, aligned: torch.Tensor) -> list[int]:
    """Count values of one dtype by their distance in units in the last place."""
    ranks = [_rank(signed_bits(side.contiguous())) for side in (base, aligned)]
    away = np.abs(ranks[0] - ranks[1])
    counts = [int(np.count_nonzero(away == units)) for units in (0, 1, 2)]
    counts.append(int(np.count_nonzero((away == 3) | (away == 4))))
    return [*counts, away.size - sum(counts)]


def _rank(bits: Bits) -> Bits:
    """Map bits to integers in the order of the numbers; 0.0 and -0.0 have one."""
    sizes = (bits & np.iinfo(bits.dtype).max).astype(np.int64)
    return np.where(bits < 0, -sizes, sizes)
