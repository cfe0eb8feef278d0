"""Deltas rounded dithered: the reference's bits, whole and in views, by compiled loops and by torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expo_serve import kernels
from expo_serve.load.fill import operands_of
from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.reader import Reader
from expo_serve.load.selection import Selection
from expo_serve.load.session import LoadSession
from expo_serve.plan.plan import Plan
from tests.models.adapters import factors, plan_delta, write_adapter
from tests.models.raw import same_bits, write_raw
from tests.models.reference import dithered, random_bits

NAME = "model.layers.0.mlp.up_proj.weight"
SEED = 11
View = Callable[[torch.Tensor], torch.Tensor]
VIEWS: list[View] = [
    lambda t: t,
    lambda t: t.t(),
    lambda t: t[5:31],
    lambda t: t[:, 7:90],
    lambda t: t.view(-1)[13:],
    lambda t: t[::2, ::3],
]


def plan_of(folder: Path, kind: str, dtype: torch.dtype, alpha: float) -> Plan:
    """A matrix of sizes that no vector divides, and a delta of tiny steps."""
    generator = torch.Generator().manual_seed(1)
    base = (0.05 * torch.randn(37, 131, generator=generator)).to(dtype)
    if kind == "lora":
        delta = write_adapter(folder / "delta", factors(NAME.removesuffix(".weight"), 37, 131, spread=0.01), r=2)
    else:
        step = (1e-4 * torch.randn(37, 131, generator=generator)).to(dtype)
        delta = write_raw(folder / "delta", {NAME: step})
        (delta / "config.json").unlink()
    return plan_delta(write_raw(folder / "base", {NAME: base}), delta, alpha, rounding="dithered", rounding_seed=SEED)


def expected_of(plan: Plan, dtype: torch.dtype) -> torch.Tensor:
    """The rule, from the operands: one fused multiplication and addition, then a random fraction of a unit."""
    planned, reader = plan.tensors[NAME], Reader()
    whole = Selection((37, 131), (131, 1), 0)
    operands = operands_of(planned, reader, ("base", "delta")).read(whole, reader.buffer)
    weight = float(torch.tensor(1 + planned.alpha, dtype=torch.float32))
    exact = (operands["base"].double() + weight * operands["delta"].double()).float()
    return dithered(exact, dtype, random_bits(NAME, exact.numel(), SEED))


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("alpha", [0, 0.1, 0.5, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_bits_are_the_references(tmp_path: Path, kind: str, dtype: torch.dtype, alpha: float, loops: bool) -> None:
    plan = plan_of(tmp_path, kind, dtype, alpha)
    with pytest.MonkeyPatch.context() as patch:
        # The product's own bits differ without its loop, by a rounding of fp32: the operands are read the same way.
        if not loops:
            patch.setattr(kernels, "available", lambda *names: False)
        expected = expected_of(plan, dtype)
        lazy = lazy_tensor(plan.tensors[NAME], LoadSession())
        for view in VIEWS:
            taken = view(lazy)
            assert same_bits(torch.empty(taken.shape, dtype=dtype).copy_(taken), view(expected).contiguous())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_base_itself_is_copied(tmp_path: Path, kind: str) -> None:
    plan = plan_of(tmp_path, kind, torch.bfloat16, -1)
    reader = Reader()
    base = reader.read(plan.base.tensors[NAME], Selection((37, 131), (131, 1), 0), "base")
    assert same_bits(lazy_tensor(plan.tensors[NAME], LoadSession()).materialize(), base)
