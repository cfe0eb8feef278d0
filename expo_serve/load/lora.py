"""Reads a tensor that a LoRA adapter changes: base is read, the low-rank product is computed."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from expo_serve import kernels
from expo_serve.checkpoint.records import Operand, TensorRecord
from expo_serve.errors import ValuesError
from expo_serve.load import sizes
from expo_serve.load.device_queue import copied_to
from expo_serve.load.dtypes import TORCH_DTYPES, meta_tensor, uint16_bits
from expo_serve.load.operands import Memory
from expo_serve.load.reader import Reader
from expo_serve.load.selection import FileSpan, Selection, cut
from expo_serve.plan.tensor_deltas import LoraModule, LowRankTensorDelta

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Factors:
    """``scale * left @ right``. fp32, contiguous: left is rows by rank, right rank by columns."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float

    @cached_property
    def zero(self) -> torch.Tensor:
        """+0.0 in the memory of the factors, with which a device begins the sum of each element."""
        return self.left.new_zeros(())

    def part(self, rows: range, columns: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the parts of both factors that some rows and columns of the product need."""
        return self.left[rows.start : rows.stop], self.right[:, columns.start : columns.stop]

    def product(self, rows: range, columns: range, out: torch.Tensor) -> None:
        """Compute a part of the product into ``out``: fp32, contiguous, as many rows and columns as the part has."""
        left = self.left[rows.start : rows.stop]
        if kernels.available("low_rank.product"):
            from expo_serve.kernels import low_rank

            low_rank.product(left.numpy(), self.right.numpy(), columns.start, out.numpy(), self.scale)
            return
        right = self.right[:, columns.start : columns.stop]
        out.copy_((left.double() @ right.double()).float() * self.scale)

    def add_to_rows(self, base: FileSpan, rows: range, out: torch.Tensor, weight: float, dither_key: int | None) -> int:
        """Read rows of base and add ``weight`` times the product to them, by the compiled loop.

        Args:
            base: where the rows are.
            rows: which.
            out: bf16, contiguous, as many rows of as many columns as the product has.
            weight: 1 + alpha.
            dither_key: the tensor's key for dithered rounding; None rounds to nearest.

        Returns:
            How many rows are done.
        """
        from expo_serve.kernels import low_rank

        left = self.left[rows.start : rows.stop].numpy()
        step = max(1, sizes.LOW_RANK_PIECE_BYTES // (2 * out.shape[1]))
        bits = uint16_bits(out).reshape(out.shape)
        place = base.descriptor, base.offset
        return low_rank.stream(
            *place, left, self.right.numpy(), bits, self.scale, weight, step,
            dither_key is not None, dither_key or 0, rows.start * out.shape[1],
        )  # fmt: skip


class LowRankOperands:
    """Reads base, and computes ``scale * B A`` for just the rows and columns that are wanted.

    The factors are read when the first element is wanted, and freed with this object.
    """

    def __init__(self, delta: LowRankTensorDelta, reader: Reader) -> None:
        self._delta, self._reader = delta, reader
        self._base = delta.base
        self._columns = _columns(delta)
        self._factors: Factors | None = None
        self._lock = threading.Lock()
        self._on_device: dict[torch.device, Factors] = {}
        start = delta.start
        self._start_bytes = start.itemsize if start else 0
        self._unread = sum(record.nbytes for record in delta.records) - (start.nbytes if start else 0)

    @property
    def grain(self) -> int:
        """Elements of one row."""
        return self._columns

    @property
    def dtypes(self) -> Mapping[Operand, torch.dtype]:
        """Return base's dtype, and fp32 for the product."""
        return {"base": TORCH_DTYPES[self._base.dtype], "delta": torch.float32}

    @property
    def widest(self) -> int:
        """Bytes of the wider of a base element and an fp32 value of the product."""
        return max(_FLOAT_BYTES, self._base.itemsize)

    def spans(self, selection: Selection) -> list[FileSpan]:
        """Return base's span only: the factors are too small to prefetch."""
        return [self._reader.span_of("base", self._base, selection)] if selection.is_contiguous else []

    def read_bytes(self, selection: Selection) -> Mapping[str, int]:
        """Count base's elements, and the factors with the first call."""
        with self._lock:
            unread, self._unread = self._unread, 0
        stored = selection.stored
        return {"base": stored * self._base.itemsize, "delta": unread + stored * self._start_bytes}

    @property
    def is_product_only(self) -> bool:
        """Return True if the delta is the product and nothing else."""
        return self._delta.start is None

    def box(self, selection: Selection) -> Box:
        """Return the rows and columns of the product that a selection needs."""
        return Box.around(selection, self._columns)

    def factors_on(self, device: torch.device) -> Factors:
        """Return the factors in the memory of a device, to which they are copied by the first call."""
        if device not in self._on_device:
            here = self.factors()
            self._on_device[device] = Factors(copied_to(device, here.left), copied_to(device, here.right), here.scale)
        return self._on_device[device]

    def read_base(self, selection: Selection, memory: Memory) -> torch.Tensor:
        """Read elements of base in their dtype."""
        return self._reader.read_into(self._base, selection, memory("base", selection.numel * self._base.itemsize))

    def read(self, selection: Selection, memory: Memory) -> dict[Operand, torch.Tensor]:
        """Read elements of base in their dtype, and compute the product for them in fp32."""
        base = self.read_base(selection, memory)
        values = memory("delta", selection.numel * _FLOAT_BYTES).values(torch.float32, selection.shape)
        self._compute(selection, values)
        if start := self._delta.start:
            values += self._reader.read(start, selection, "start").float() - base.float()
        return {"base": base, "delta": values}

    def _compute(self, selection: Selection, values: torch.Tensor) -> None:
        """Compute the product over the bounding box of the selection and pick its elements; split large boxes."""
        box = Box.around(selection, self._columns)
        if box.size > sizes.LOW_RANK_BOX_VALUES and max(selection.shape, default=1) > 1:
            dim, halves = selection.halves()
            for start, length in halves:
                self._compute(selection.narrow(dim, start, length), values.narrow(dim, start, length))
            return
        steps = torch.empty(len(box.rows), len(box.columns), dtype=torch.float32, device="cpu")
        self.factors().product(box.rows, box.columns, steps)
        values.copy_(box.pick(steps, selection))

    def fill_prefix(self, dest: torch.Tensor, selection: Selection, alpha: float, dither_key: int | None) -> int:
        """Read rows of base straight into ``dest`` and add the product in place."""
        columns = self._columns
        is_plain = self._base.dtype == "BF16" and not self._delta.start and selection.offset % columns == 0
        if not is_plain or not kernels.available("bf16.combine", "low_rank.stream"):
            return 0
        factors = self.factors()
        first = selection.offset // columns
        rows = range(first, first + selection.numel // columns)
        there = self._reader.span_of("base", self._base, selection)
        with self._reader.activity.during(there.path):
            done = factors.add_to_rows(there, rows, dest.view(-1, columns), 1 + alpha, dither_key) * columns
        self._reader.activity.add_bytes(done * dest.element_size())
        return done

    def factors(self) -> Factors:
        """Return the factors, which the first call reads.

        Raises:
            ExpoError: a file cannot be read, or a factor holds NaN or Inf.
        """
        with self._lock:
            if self._factors is None:
                self._factors = _join([self._module(module) for module in self._delta.modules])
            return self._factors

    def _module(self, module: LoraModule) -> Factors:
        a, b = self._matrix(module.a), self._matrix(module.b)
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], b.shape[1])
        if module.orientation(self._base.shape):
            return Factors(a.t().contiguous(), b.t().contiguous(), module.scale)
        return Factors(b.contiguous(), a.contiguous(), module.scale)

    def _matrix(self, record: TensorRecord) -> torch.Tensor:
        whole = Selection.of(meta_tensor(record))
        values = torch.empty(record.shape, dtype=torch.float32, device="cpu")
        for out, piece in cut(values, whole, sizes.PIECE_BYTES // record.itemsize):
            out.copy_(self._reader.read(record, piece, "factor"))
        # A finite sum proves finite terms, at a fraction of the price of looking at each.
        if not math.isfinite(values.sum().item()) and not values.isfinite().all():
            raise ValuesError(f"tensor {record.name!r} in {record.file} holds NaN or Inf; the adapter is damaged")
        return values


def _columns(delta: LowRankTensorDelta) -> int:
    rows = delta.base.shape[0]
    return delta.base.numel // rows if rows else 1


def _join(parts: list[Factors]) -> Factors:
    """Join the modules that share a tensor into one product, their ranks side by side."""
    if len(parts) == 1:
        return parts[0]
    left = torch.cat([part.left * part.scale for part in parts], dim=1)
    return Factors(left, torch.cat([part.right for part in parts], dim=0), 1.0)


@dataclass(frozen=True)
class Box:
    """The smallest rectangle of a matrix that covers a selection."""

    rows: range
    columns: range
    width: int
    """Columns of the matrix."""

    @property
    def size(self) -> int:
        """Number of values in it."""
        return len(self.rows) * len(self.columns)

    @staticmethod
    def around(selection: Selection, width: int) -> Box:
        """Return the box of a selection: all columns if a dimension of the selection wraps around rows."""
        if not selection.numel:
            return Box(range(0), range(0), width)
        start, last = selection.offset, selection.end - 1
        across = start % width + sum(
            (size - 1) * (stride % width) for size, stride in zip(selection.shape, selection.stride, strict=True)
        )
        rows = range(start // width, last // width + 1)
        return Box(rows, range(start % width, across + 1) if across < width else range(width), width)

    def pick(self, values: torch.Tensor, selection: Selection) -> torch.Tensor:
        """Pick the elements of the selection from the values of the box."""
        columns = len(self.columns)
        if columns == self.width:
            return values.as_strided(selection.shape, selection.stride, selection.offset - self.rows.start * self.width)
        strides = [stride // self.width * columns + stride % self.width for stride in selection.stride]
        return values.as_strided(selection.shape, strides, 0)
