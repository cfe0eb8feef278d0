"""One block of a copy: some elements of a tensor, computed into their part of a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

import torch

from expo_serve import kernels
from expo_serve.checkpoint.records import Operand, TensorRecord
from expo_serve.load import sizes
from expo_serve.load.formula import NotFiniteError, combine_into, combine_unchecked
from expo_serve.load.lora import LowRankOperands
from expo_serve.load.operands import Operands, Recipe, RecordOperands
from expo_serve.load.packed import PackedOperands
from expo_serve.load.reader import Reader
from expo_serve.load.selection import Selection, cut
from expo_serve.load.session import LoadSession
from expo_serve.plan.plan import PlannedTensor
from expo_serve.plan.tensor_deltas import FullTensorDelta, LowRankTensorDelta, PackedTensorDelta

if TYPE_CHECKING:
    from expo_serve.load.streaming import Streamed  # numba takes a quarter of a second to import


@dataclass(frozen=True, slots=True)
class Fill:
    """Which elements go where, and how they are computed; calling it does the work, in any thread.

    ``dest`` has the shape of ``selection``, on any device and of any dtype.
    """

    dest: torch.Tensor
    selection: Selection
    recipe: Recipe
    session: LoadSession
    is_read_next: bool = False
    """Whether the results are read as soon as they are there; parameters are not."""

    def __call__(self) -> None:
        """Read and combine the elements, then count what was read.

        Raises:
            CheckpointError: a file cannot be read.
            ExpoError: a value is not finite, as the recipe reports it.
        """
        done = 0
        if block := self._streamed():
            from expo_serve.load.streaming import stream_all

            (done,) = stream_all([block], self.session.reader, self.is_read_next)
        elif self._suits_compiled_loops():
            recipe = self.recipe
            done = recipe.operands.fill_prefix(self.dest, self.selection, recipe.alpha, recipe.dither_key)
        self._fill_pieces(done)
        self.session.account(self.recipe, self.selection)

    def call_together(self, others: Sequence[Fill]) -> None:
        """Do the work of this block and of others of the session: small ones by one call of the compiled loop.

        Raises:
            ExpoError: as for one.
        """
        fills = (self, *others)
        blocks = [fill._streamed() for fill in fills]
        streamed = [block for block in blocks if block]
        if not streamed:
            for fill in fills:
                fill()
            return
        from expo_serve.load.streaming import stream_all

        done = iter(stream_all(streamed, self.session.reader, self.is_read_next))
        for fill, block in zip(fills, blocks, strict=True):
            if not block:
                fill()
                continue
            fill._fill_pieces(next(done))
            fill.session.account(fill.recipe, fill.selection)

    def _streamed(self) -> Streamed | None:
        operands, recipe = self.recipe.operands, self.recipe
        if not isinstance(operands, RecordOperands) or not self._suits_compiled_loops():
            return None
        return operands.streamed(self.dest, self.selection, recipe.alpha, recipe.dither_key)

    def _suits_compiled_loops(self) -> bool:
        dest, recipe = self.dest, self.recipe
        is_plain = dest.is_cpu and dest.is_contiguous() and self.selection.is_contiguous and dest.numel() > 0
        return is_plain and dest.dtype == recipe.dtype == torch.bfloat16 and recipe.fail is not None

    def _fill_pieces(self, done: int) -> None:
        """Compute what the compiled loops left, most often nothing, in pieces that stay in the cache."""
        dest, selection, recipe = self.dest, self.selection, self.recipe
        if done == dest.numel():
            return
        if done:
            dest = dest.view(-1)[done:]
            selection = Selection.flat(selection.offset + done, dest.numel())
        limit = sizes.PIECE_BYTES // recipe.operands.widest
        for out, piece in cut(dest, selection, limit, recipe.operands.grain):
            _combine_piece(out, piece, recipe.operands.read(piece, self.session.reader.buffer), recipe)


def _combine_piece(out: torch.Tensor, piece: Selection, operands: dict[Operand, torch.Tensor], recipe: Recipe) -> None:
    if not out.is_cpu:  # on a device without a stage: it gets the host's result
        result = torch.empty(out.shape, dtype=recipe.dtype, device="cpu")
        _combine_piece(result, piece, operands, recipe)
        with torch.no_grad():
            out.copy_(result)
        return
    noise = recipe.noise(piece, out.device)
    with torch.no_grad():
        if recipe.fail is None:
            combine_unchecked(out, operands, recipe.dtype, recipe.alpha, noise)
            return
        try:
            combine_into(out, operands, recipe.dtype, recipe.alpha, noise)
        except NotFiniteError as error:
            raise recipe.fail(str(error)) from None


def operands_of(planned: PlannedTensor, reader: Reader, used: tuple[Operand, ...]) -> Operands:
    """Make the object that reads a planned tensor's operands.

    Args:
        planned: the tensor.
        reader: opens its files.
        used: the operands that are wanted.
    """
    delta = planned.delta
    match delta:
        case None:
            records = {"base": planned.base, "aligned": planned.aligned}
            sources = {"base": "base", "aligned": planned.origin}
            stored = {operand: record for operand in used if (record := records[operand])}
            return RecordOperands(reader, stored, sources)
        case PackedTensorDelta():
            return PackedOperands(delta, reader, used)
        case LowRankTensorDelta() | FullTensorDelta() if "delta" not in used:
            return RecordOperands(reader, {"base": delta.base}, {"base": "base"})
        case LowRankTensorDelta():
            return LowRankOperands(delta, reader)
        case FullTensorDelta():
            both: dict[Operand, TensorRecord] = {"base": delta.base, "delta": delta.record}
            return RecordOperands(reader, both, {"base": "base", "delta": "delta"})
        case _:
            assert_never(delta)


_OF_CPU: dict[str | None, tuple[kernels.Loop, ...]] = {
    "packed": ("reading.fetch", "sparse.extrapolate", "sparse.apply16"),
    "lora": ("low_rank.stream", "low_rank.product"),
}
_OF_DEVICE: dict[str | None, tuple[kernels.Loop, ...]] = {"lora": ("low_rank.product",)}
"""By the format of the delta: the loops that only a load of this format uses."""


def compile_kernels(delta_format: str | None, *, for_device: bool = False) -> str:
    """Compile the loops that a load uses, so that they are ready when it begins.

    Args:
        delta_format: ``packed``, ``lora`` or ``full``; None for a pair.
        for_device: for a load onto a device, which combines by itself.

    Returns:
        Why torch has to do their work, and what to do about it, in one line; empty if they are ready.
    """
    if for_device:
        kernels.available(*_OF_DEVICE.get(delta_format, ()), "reading.gather")
    else:
        kernels.available(
            "bf16.combine",
            "dither.fill",
            "measuring.tally",
            "reading.stream",
            "reading.gather",
            *_OF_CPU.get(delta_format, ()),
        )
    return missing_kernels()


def missing_kernels() -> str:
    """Return why loops that were wanted until now are not used, and what to do, in one line; empty if all are used."""
    return kernels.reason()
