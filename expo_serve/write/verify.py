"""Verifies every block of a packed delta: its checksums, its base and, if given, the checkpoint that it decodes to."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from expo_serve.checkpoint.folder import Checkpoint
from expo_serve.checkpoint.records import TensorRecord
from expo_serve.errors import PairError, ValuesError, count_of, warn
from expo_serve.load.fill import missing_kernels, operands_of
from expo_serve.load.reader import Reader
from expo_serve.load.selection import Selection
from expo_serve.load.threads import in_order
from expo_serve.plan.plan import Plan, PlannedTensor
from expo_serve.plan.tensor_deltas import PackedTensorDelta
from expo_serve.progress import Progress

_Block = tuple[PlannedTensor, Selection]


def verify_packed_delta(plan: Plan, aligned: Checkpoint | None, progress: Progress) -> None:
    """Decode every block once and compare.

    Args:
        plan: plan of base and the packed delta at alpha 0, with every tensor.
        aligned: the checkpoint that the delta must decode to, bit by bit; None skips this comparison.
        progress: counts bytes of the aligned checkpoint.

    Raises:
        CheckpointError: a block is damaged.
        ValuesError: the values of base or of ``aligned`` are not those that the delta was made from.
        PairError: ``aligned`` has other tensors.
    """
    if aligned:
        _refuse_other_tensors(plan, aligned)
    reader = Reader()
    progress.watch(reader.activity)

    def work(block: _Block) -> None:
        tensor, elements = block
        found = operands_of(tensor, reader, ("aligned",)).read(elements, reader.buffer)["aligned"]
        if aligned and not _same_bits(found, reader.read(aligned.tensors[tensor.name], elements, "expected")):
            raise ValuesError(
                f"tensor {tensor.name!r} in {aligned.tensors[tensor.name].file} is not what the delta decodes to: "
                f"the delta was made from another checkpoint than {aligned.source.name}"
            )

    for (tensor, elements), _ in in_order(work, _blocks(plan)):
        progress.advance(elements.numel * tensor.result.itemsize)
    if reason := missing_kernels():
        warn(reason)


def _blocks(plan: Plan) -> Iterator[_Block]:
    for tensor in plan.tensors.values():
        assert isinstance(tensor.delta, PackedTensorDelta)
        for start, end in tensor.delta.tensor.spans(tensor.delta.block):
            yield tensor, Selection.flat(start, end - start)


def _refuse_other_tensors(plan: Plan, aligned: Checkpoint) -> None:
    ours = {name: tensor.result for name, tensor in plan.tensors.items()}
    wrong = [
        f"{name}: {_describe(ours.get(name))} in the delta, {_describe(aligned.tensors.get(name))} in aligned"
        for name in {**ours, **aligned.tensors}
        if _describe(ours.get(name)) != _describe(aligned.tensors.get(name))
    ]
    if wrong:
        count = count_of(len(wrong), "tensor differs", "tensors differ")
        raise PairError(
            f"the delta was made from another checkpoint than {aligned.source.name}: {count} in name, dtype or shape, "
            f"the first {wrong[0].split(':')[0]}",
            wrong,
        )


def _describe(record: TensorRecord | None) -> str:
    return record.dtype_and_shape if record else "nothing"


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
