"""Measures a planned pair: reads every value of both sides, on all cores, and counts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from expo_serve.checkpoint.records import DITHERED_DTYPES, Operand
from expo_serve.config import ExpoConfig, Method, Rounding, format_alpha
from expo_serve.load import sizes
from expo_serve.load.dither import noise
from expo_serve.load.dtypes import TORCH_DTYPES
from expo_serve.load.fill import operands_of
from expo_serve.load.operands import Operands, RecordOperands
from expo_serve.load.reader import Reader
from expo_serve.load.selection import Selection
from expo_serve.load.threads import in_order
from expo_serve.measure.groups import Group, group_of, layer_of
from expo_serve.measure.measurement import MeasuredGroup, MeasuredLayer, MeasuredPart, Measurement
from expo_serve.measure.tally import UNITS, Tally, tally, tally_stored
from expo_serve.measure.verdict import judge
from expo_serve.plan.names import is_leftover
from expo_serve.plan.plan import Plan, PlannedTensor
from expo_serve.progress import Progress

METHODS: tuple[Method, ...] = ("nearest", "dithered")


@dataclass
class _Part:
    """What is known of some tensors."""

    names: set[str] = field(default_factory=set)
    tally: Tally = field(default_factory=Tally)

    def add(self, name: str, found: Tally) -> None:
        self.names.add(name)
        self.tally.add(found)


@dataclass(frozen=True)
class _Block:
    """Elements of one tensor: the work of a thread at a time."""

    planned: PlannedTensor
    operands: Operands
    elements: Selection


def measure_plan(plan: Plan, config: ExpoConfig, progress: Progress, *, learned_to_talk: bool = False) -> Measurement:
    """Measure every tensor that is extrapolated, but for the rows that only aligned has.

    Args:
        plan: of a pair, or of base and a delta.
        config: its alpha and the seed of dithered rounding.
        progress: counts bytes of aligned.
        learned_to_talk: whether only aligned has a chat template.

    Raises:
        ExpoError: a file cannot be read, or holds what it must not.
    """
    reader = Reader()
    progress.watch(reader.activity)
    total, groups, layers = _Part(), defaultdict[Group, _Part](_Part), defaultdict[int, _Part](_Part)
    alphas = defaultdict[float, _Part](_Part)
    for block, found in in_order(lambda block: _measured(block, config, reader), _blocks(plan, reader)):
        planned = block.planned
        parts = [total, groups[group_of(planned.aligned)], alphas[planned.alpha]]
        layer = layer_of(planned.name)
        for part in (*parts, *([] if layer is None else [layers[layer]])):
            part.add(planned.name, found)
        progress.advance(block.elements.numel * planned.result.itemsize)
    measured = MeasuredPart(**_figures(total, config.alpha))
    by_alpha = {format_alpha(alpha): _effective(part.tally, alpha) for alpha, part in alphas.items()}
    return Measurement(
        effective_alpha=by_alpha.get(config.alpha_text, dict.fromkeys(METHODS)),
        effective_alphas=by_alpha,
        total=measured,
        groups=[MeasuredGroup(group=group, **_figures(part, config.alpha)) for group, part in groups.items()],
        layers=[MeasuredLayer(layer=layer, **_figures(part, config.alpha)) for layer, part in sorted(layers.items())],
        verdict=judge(measured, learned_to_talk=learned_to_talk),
    )


def _blocks(plan: Plan, reader: Reader) -> Iterator[_Block]:
    for planned in plan.extrapolated:
        assert planned.base is not None
        if is_leftover(planned.aligned):
            continue
        both: tuple[Operand, Operand] = ("base", planned.delta.operand if planned.delta else "aligned")
        operands = operands_of(planned, reader, both)
        step = max(operands.grain, sizes.BLOCK_BYTES // operands.widest // operands.grain * operands.grain)
        for start in range(0, planned.base.numel, step):
            yield _Block(planned, operands, Selection.flat(start, min(step, planned.base.numel - start)))


def _measured(block: _Block, config: ExpoConfig, reader: Reader) -> Tally:
    """Read and count a block, in pieces that stay in the cache."""
    planned, operands, elements = block.planned, block.operands, block.elements
    dtype = TORCH_DTYPES[planned.result.dtype]
    key = Rounding("dithered", config.rounding_seed).key(planned.name)
    if key is not None and isinstance(operands, RecordOperands):
        found, done = tally_stored(operands, elements, dtype, planned.alpha, key)
        elements = Selection.flat(elements.offset + done, elements.numel - done)
    else:
        found = Tally()
    step = max(operands.grain, sizes.STREAM_PIECE_BYTES // operands.widest // operands.grain * operands.grain)
    for start in range(elements.offset, elements.end, step):
        piece = Selection.flat(start, min(step, elements.end - start))
        random = noise(piece, key, torch.device("cpu")) if key and planned.result.dtype in DITHERED_DTYPES else None
        with torch.no_grad():
            found.add(tally(operands.read(piece, reader.buffer), dtype, planned.alpha, random))
    return found


def _figures(part: _Part, alpha: float) -> dict[str, Any]:
    found = part.tally
    values = sum(found.units)
    shares = [count / max(1, values) for count in found.units]
    size = found.aligned_squares
    return {
        "tensors": len(part.names),
        "values": values,
        "share_unchanged": shares[0],
        "units": dict(zip(UNITS[1:], shares[1:], strict=True)),
        "step": (found.step_squares / size) ** 0.5 if size else None,
        "effective_alpha": _effective(found, alpha),
    }


def _effective(found: Tally, alpha: float) -> dict[Method, float | None]:
    """Return the effective alpha by rounding. At 0 and -1 it is alpha: bits are copied, or alpha 0 is rounded to."""
    if alpha in (0, -1):
        return dict.fromkeys(METHODS, alpha if found.step_squares else None)
    return {method: found.effective_alpha(method) for method in METHODS}
