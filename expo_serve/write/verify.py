"""Every block of a packed delta against its checksums, its base and, if given, the checkpoint that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from expo_serve.checkpoint.folder import Checkpoint
from expo_serve.checkpoint.records import TensorRecord
from expo_serve.errors import PairError, ValuesError
from expo_serve.load.fill import operands_of
from expo_serve.load.reader import Reader
from expo_serve.load.selection import Selection
from expo_serve.load.threads import in_order
from expo_serve.plan.plan import Plan, PlannedTensor
from expo_serve.plan.tensor_deltas import PackedTensorDelta

_Block = tuple[PlannedTensor, Selection]


def check(plan: Plan, aligned: Checkpoint | None, advance: Callable[[int], None]) -> None:
    """Decode everything once.

    Args:
        plan: of base and the packed delta, with every tensor.
        aligned: what it must decode to.
        advance: told of bytes of the aligned side that are done.

    Raises:
        CheckpointError: a block is damaged.
        ValuesError: base has other values than the delta was made against, or aligned has.
        PairError: aligned has other tensors.
    """
    if aligned:
        _refuse_other_tensors(plan, aligned)
    reader = Reader()

    def work(block: _Block) -> None:
        tensor, elements = block
        found = operands_of(tensor, reader, ("aligned",)).read(elements, reader.buffer)["aligned"]
        if aligned and not _same_bits(found, reader.read(aligned.tensors[tensor.name], elements, "expected")):
            raise ValuesError(
                f"tensor {tensor.name!r} in {aligned.tensors[tensor.name].file} is not what the delta decodes to: "
                f"the delta was made from another checkpoint than {aligned.source.name}"
            )

    for (tensor, elements), _ in in_order(work, _blocks(plan)):
        advance(elements.numel * tensor.result.nbytes // max(1, tensor.result.numel))


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
        raise PairError(
            f"the delta was made from another checkpoint than {aligned.source.name}: {len(wrong)} tensors differ "
            f"in name, "
            f"dtype or shape, the first {wrong[0].split(':')[0]}",
            wrong,
        )


def _describe(record: TensorRecord | None) -> str:
    return f"{record.dtype} {list(record.shape)}" if record else "nothing"


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
