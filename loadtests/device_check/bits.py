"""Are the bits on the device those that the CPU makes of the same elements?

Every destination lies in memory that was filled with NaN before, with a margin around it: what was not written is seen,
and so is what was written beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from expo_serve.config import Method
from expo_serve.load.lazy import LazyTensor, lazy_tensor
from expo_serve.load.session import LoadSession
from expo_serve.plan.plan import Plan
from loadtests.device_check import files, stage
from loadtests.device_check.distance import NONE, Distance, distance
from loadtests.device_check.setting import Setting

Kind = Literal["pair", "lora", "full", "packed"]
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
    "fp32+bf16": (torch.float32, torch.bfloat16),
}
"""Of base, and of what lies beside it."""
ALPHAS = (-1.0, 0.0, 0.5, 1.7, 9.0)
QUICK_DTYPES, QUICK_ALPHAS = ("bf16", "fp32+bf16"), (0.0, 0.5, 9.0)
RANKS, RANK = 8, 5
"""Of the tensor parallelism whose parts are taken, and whose part."""

WEIGHT = "model.layers.0.mlp.down_proj.weight"
MATRIX = "model.layers.0.mlp.up_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
VOCABULARY = "model.embed_tokens.weight"
SINGLE = "model.layers.0.self_attn.q_proj.weight"

_BESIDE: dict[Kind, str] = {"pair": "aligned", "lora": "delta", "full": "delta", "packed": "delta"}
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_MARGIN = 256
_SHOWN = 12


@dataclass(frozen=True)
class Place:
    """What a model takes of a tensor, and where it puts it."""

    name: str
    tensor: str
    take: Callable[[Any], Any] = lambda tensor: tensor
    dtype: torch.dtype | None = None
    """Of the destination, when it is another one."""
    gap: int = 0
    """Elements between the rows of the destination."""


def places(kind: Kind) -> list[Place]:
    """All ways that are checked for a kind of sources."""
    found = [
        Place("whole", WEIGHT),
        Place("column of 8 ranks", WEIGHT, lambda tensor: tensor.chunk(RANKS, 0)[RANK]),
        Place("row of 8 ranks", WEIGHT, lambda tensor: tensor.chunk(RANKS, 1)[RANK]),
        Place("transposed", MATRIX, lambda tensor: tensor.t()),
        Place("one element", SINGLE),
        Place("strided destination", WEIGHT, gap=24),
        Place("strided row of 8 ranks", WEIGHT, lambda tensor: tensor.chunk(RANKS, 1)[RANK], gap=3),
        Place("fp16 destination", WEIGHT, dtype=torch.float16),
        Place("fp8 destination", WEIGHT, dtype=torch.float8_e4m3fn),
    ]
    if kind != "lora":  # no adapter has deltas of these
        found.append(Place("transposed expert", EXPERTS, lambda tensor: tensor[1].t()))
        found.append(Place("rows of an expert", EXPERTS, lambda tensor: tensor[2].chunk(2, 0)[1]))
    if kind in ("pair", "packed"):
        found.append(Place("grown vocabulary", VOCABULARY))
    return found


class Destination:
    """A tensor on the device amid memory that must stay as it is."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, gap: int, device: torch.device) -> None:
        rows, width = (shape[0], shape[1:].numel()) if len(shape) else (1, 1)
        size = rows * (width + gap)
        self._raw = torch.empty((size + 2 * _MARGIN) * dtype.itemsize, dtype=torch.uint8, device=device)
        self._raw.fill_(0xFF)  # NaN in every floating dtype
        strides = (width + gap, *torch.empty(shape[1:], device="meta").stride()) if len(shape) else ()
        self.tensor = self._raw.view(dtype).as_strided(shape, strides, _MARGIN)

    def falsify(self) -> None:
        """Flip the lowest bit of the middle element."""
        if not self.tensor.numel():
            return
        place = _MARGIN + sum((size // 2) * step for size, step in zip(*self._layout(), strict=True))
        self._raw[place * self.tensor.element_size()] ^= 1

    def _layout(self) -> tuple[torch.Size, tuple[int, ...]]:
        return self.tensor.shape, self.tensor.stride()

    def spilled(self) -> int:
        """Bytes around the tensor that are not as they were."""
        around = self._raw.cpu().clone()
        inside = around.view(self.tensor.dtype).as_strided(*self._layout(), _MARGIN)
        inside.view(_INTEGERS[inside.element_size()]).fill_(-1)
        return int((around != 0xFF).count_nonzero())


@dataclass(frozen=True)
class Checked:
    """One destination against the CPU's values."""

    place: Place
    distance: Distance
    is_exact: bool
    """Whether every bit must be the same; else the last place may differ."""
    spilled: int

    @property
    def is_wrong(self) -> bool:
        """Whether a value is another one, missing, or beside its place."""
        return bool(self.spilled or self.distance.beyond or (self.is_exact and self.distance.differing))


def run(setting: Setting, kind: Kind, rounding: Method) -> dict[str, Any]:
    """All dtypes, alphas and places of one kind of sources."""
    dtypes = QUICK_DTYPES if setting.quick else tuple(DTYPES)
    by_combination: dict[str, dict[str, Any]] = {}
    wrong: list[str] = []
    ways: Counter[str] = Counter()
    for dtype in dtypes:
        if rounding == "dithered" and dtype == "fp32":
            continue  # it is rounded to nearest under both
        folder = _sources(setting, kind, dtype)
        for alpha in QUICK_ALPHAS if setting.quick else ALPHAS:
            plan = files.plan(folder / "base", folder / _BESIDE[kind], alpha, rounding)
            for name, choice in _choices(setting):
                title = f"{dtype} alpha {alpha:g}{name}"
                with stage.counted_ways() as counted:
                    checked = list(_check(setting, plan, kind, alpha, choice))
                ways += counted
                by_combination[title] = _summed(checked)
                wrong += [_sentence(title, one) for one in checked if one.is_wrong]
    return {
        "places": [place.name for place in places(kind)],
        "pieces_by_way": dict(ways),
        "combinations": by_combination,
        "share_that_differs": _share(by_combination),
        "number_wrong": len(wrong),
        "wrong": wrong[:_SHOWN],
    }


def _choices(setting: Setting) -> list[tuple[str, stage.Choice]]:
    return [("", stage.USUAL), (", small pieces", stage.SMALL)] if setting.is_cuda else [("", stage.USUAL)]


def _check(setting: Setting, plan: Plan, kind: Kind, alpha: float, choice: stage.Choice) -> Iterator[Checked]:
    """Load every place in one session, as a model does, then look at each."""
    chosen = places(kind)
    taken = [place.take(_on_host(plan, place.tensor)) for place in chosen]
    made = [
        Destination(lazy.shape, place.dtype or lazy.dtype, place.gap, setting.device)
        for place, lazy in zip(chosen, taken, strict=True)
    ]
    parameters = {str(index): destination.tensor for index, destination in enumerate(made)}
    with stage.session_into(parameters, choice) as session:
        for place, destination in zip(chosen, made, strict=True):
            destination.tensor.copy_(place.take(stage.lazy(plan, place.tensor, session)))
    setting.synchronize()
    if setting.plants:
        made[0].falsify()
    for place, lazy, destination in zip(chosen, taken, made, strict=True):
        expected = lazy.materialize()
        slack = 2.0**-22 * (1 + abs(alpha)) * float(expected.float().abs().max())
        apart = distance(destination.tensor, expected.to(destination.tensor.dtype), slack)
        # An interpolation may be contracted by one compiler and not by another; sums with a delta are emulated.
        is_exact = alpha in (0, -1) or kind in ("lora", "full")
        yield Checked(place, apart, is_exact, destination.spilled())


def _on_host(plan: Plan, name: str) -> LazyTensor:
    """A tensor of a session without a device: the reference."""
    return lazy_tensor(plan.tensors[name], LoadSession())


def _summed(checked: list[Checked]) -> dict[str, Any]:
    whole = sum((one.distance for one in checked), NONE)
    return {**asdict(whole), "spilled": sum(one.spilled for one in checked)}


def _share(combinations: dict[str, dict[str, Any]]) -> float:
    values = sum(int(one["values"]) for one in combinations.values())
    return sum(int(one["differing"]) for one in combinations.values()) / max(1, values)


def _sentence(title: str, one: Checked) -> str:
    found = one.distance
    spilled = f", {one.spilled} bytes beside it written" if one.spilled else ""
    return (
        f"{title}, {one.place.name}: {found.differing} of {found.values} values differ, by {found.largest} steps at "
        f"most, {found.unwritten} unwritten{spilled}"
    )


def _sources(setting: Setting, kind: Kind, dtype: str) -> Path:
    """The folder with the files of a kind and dtype."""
    folder = setting.work / f"bits-{kind}-{dtype}{'-quick' if setting.quick else ''}"
    return files.made_once(folder, lambda to: _write(to, kind, dtype, 1 if setting.quick else 16))


def _write(folder: Path, kind: Kind, dtype: str, scale: int) -> None:
    base_dtype, other_dtype = DTYPES[dtype]
    base = _base(scale)
    aligned = {name: _aligned(name, values) for name, values in base.items()}
    files.write_checkpoint(folder / "base", _cast(base, base_dtype), **_vocabulary(base))
    if kind == "lora":
        factors = {name: _factors(base[name], other_dtype) for name in (WEIGHT, MATRIX, SINGLE)}
        files.write_adapter(folder / "delta", factors)
    elif kind == "full":
        steps = {name: aligned[name][: len(values)] - values for name, values in base.items()}
        files.write_checkpoint(folder / "delta", _cast(steps, other_dtype), **_vocabulary(base))
    else:
        files.write_checkpoint(folder / "aligned", _cast(aligned, other_dtype), **_vocabulary(aligned))
    if kind == "packed":
        files.write_packed(folder / "base", folder / "aligned", folder / "delta")


def _base(scale: int) -> dict[str, torch.Tensor]:
    """Tensors of some megabytes, the first with values that arithmetic likes to lose."""
    rows, columns = 264 * scale, 72 * scale
    shapes: dict[str, files.Shape] = {
        WEIGHT: (rows, columns),
        MATRIX: (columns, rows),
        EXPERTS: (4, 40 * scale, 24 * scale),
        VOCABULARY: (100 * scale, 40 * scale),
        SINGLE: (1, 1),
    }
    tensors = {name: files.numbers(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    special = torch.tensor([0.0, -0.0, 6e-8, -6e-8, 1e-5, 100.0, -100.0, 2.0**-14])
    tensors[WEIGHT][1, : len(special)] = special
    return tensors


def _aligned(name: str, base: torch.Tensor) -> torch.Tensor:
    """A small step further: every other value stays; a vocabulary has grown by some rows."""
    step = files.numbers(tuple(base.shape), 99, spread=0.05)
    step.view(-1)[::2] = 0
    grown = files.numbers((7, base.shape[1]), 98) if name == VOCABULARY else base[:0]
    return torch.cat([base + step, grown])


def _factors(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rank = 8
    outputs, inputs = weight.shape
    return files.numbers((rank, inputs), 5, 0.1).to(dtype), files.numbers((outputs, rank), 6, 0.1).to(dtype)


def _cast(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _vocabulary(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {"vocab_size": len(tensors[VOCABULARY])}
