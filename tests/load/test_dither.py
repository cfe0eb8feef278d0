"""Dithered rounding: the reference's bits by every way, whatever is selected, and alpha kept in expectation."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from expo_serve import kernels
from expo_serve.config import Rounding
from expo_serve.load.dither import noise, round_dithered
from expo_serve.load.fill import Fill
from expo_serve.load.formula import combine_unchecked
from expo_serve.load.selection import Selection
from tests.load.lazies import NAME, Lazies, numbers
from tests.models.reference import dithered, random_bits

CPU = torch.device("cpu")
MOST_KERNELS = {torch.bfloat16: 1 + 14, torch.float16: 1 + 16}
"""Operations that a device is given to combine and round one contiguous piece; the first does it all to nearest."""
LARGE = (1 << 33) - 7
"""Just before the element at which a key changes."""


def key(name: str = NAME, seed: int = 0) -> int:
    found = Rounding("dithered", seed).key(name)
    assert found is not None
    return found


@pytest.fixture(params=["loops", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Random bits and rounding by compiled loops, or by torch as on a device."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "available", lambda *loops: False)
    else:
        assert kernels.available("dither.fill", "dither.round_to_bf16", "dither.round_to_fp16"), kernels.reason()
    return str(request.param)


def test_key_is_a_digest_of_seed_and_name() -> None:
    assert key("a.weight", 7) == int.from_bytes(hashlib.sha256(b"7:a.weight").digest()[:8], "little")
    assert Rounding("nearest", 7).key("a.weight") is None


@pytest.mark.parametrize("start", [0, 1, 4095, 12_345, LARGE, (1 << 34) + 5])
@pytest.mark.parametrize("count", [1, 2, 13, 5000])
@pytest.mark.usefixtures("way")
def test_bits_of_contiguous_elements(start: int, count: int) -> None:
    found = noise(Selection.flat(start, count), key(), CPU)
    assert (found.to(torch.int64) & 0xFFFF).tolist() == random_bits(NAME, count, start=start).tolist()


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
@pytest.mark.usefixtures("way")
def test_bits_depend_on_name_and_seed(seed: int) -> None:
    for name in (NAME, "lm_head.weight"):
        found = noise(Selection.flat(0, 64), key(name, seed), CPU)
        assert (found.to(torch.int64) & 0xFFFF).tolist() == random_bits(name, 64, seed).tolist()


VIEWS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda t: t,
    lambda t: t.t(),
    lambda t: t[1:, 2:5],
    lambda t: t[:, ::2],
    lambda t: t.view(-1)[3:],
    lambda t: t[:, 3],
    lambda t: t[2, 3],
    lambda t: t[None].expand(3, *t.shape),
    lambda t: t.view(4, 3, 2, 5).permute(2, 0, 3, 1),
]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.usefixtures("way")
def test_view_has_the_bits_of_its_elements(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    whole = torch.from_numpy(random_bits(NAME, 120)).view(12, 10)
    found = noise(Selection.of(view(torch.empty(12, 10, device="meta"))), key(), CPU)
    assert torch.equal(found.to(torch.int64) & 0xFFFF, view(whole))


def rounded(values: torch.Tensor, random: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded into memory that is not contiguous, which shows at once that any is served."""
    out = torch.empty(*values.shape, 2, dtype=dtype)[..., 1]
    round_dithered(values, random, out)
    return out.contiguous()


SPECIAL = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1.0, -1.5, 2**-14, 2**-24, 2**-25, 2**-126, 2**-149, 65504.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("way")
def test_rounding_is_the_references(dtype: torch.dtype) -> None:
    """Numbers of every size, to subnormal ones and to those that overflow."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), generator=generator).to(torch.int32)
    values = torch.cat([bits.view(torch.float32), torch.randn(1 << 16, generator=generator) * 1e-5, SPECIAL])
    values = values[~values.isnan()]
    random = random_bits(NAME, len(values))
    found = rounded(values, torch.from_numpy(random).to(torch.int16), dtype)
    expected = torch.where(values.isinf(), values.to(dtype), dithered(values.nan_to_num(), dtype, random))
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("way")
def test_exact_values_stay_and_nan_is_never_a_number(dtype: torch.dtype) -> None:
    every = torch.arange(2**16).to(torch.int16).view(dtype)
    largest = torch.full(every.shape, -1, dtype=torch.int16)
    found = rounded(every.float(), largest, dtype)
    finite = every.isfinite()
    assert torch.equal(found[finite].view(torch.int16), every[finite].view(torch.int16))
    assert not found[~finite].isfinite().any()
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert not rounded(nans, largest[:3], dtype).isfinite().any()


@settings(deadline=None, max_examples=60)
@given(
    value=st.floats(-1e4, 1e4, width=32).filter(lambda value: abs(value) > 1e-6),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    name=st.sampled_from(["a", "model.layers.3.mlp.up_proj.weight"]),
)
def test_mean_of_many_is_the_value(value: float, dtype: torch.dtype, name: str) -> None:
    count = 1 << 16
    values = torch.full((count,), value, dtype=torch.float32)
    found = rounded(values, noise(Selection.flat(0, count), key(name), CPU), dtype).double()
    step = float(found.max() - found.min())
    assert len(set(found.tolist())) <= 2
    assert abs(float(found.mean()) - float(values[0])) <= 5 * 0.5 * step / math.sqrt(count)


def test_bits_are_uniform_and_neighbours_independent() -> None:
    """Chi-square of the values of both halves, and of pairs of neighbours: 16 classes each, within six deviations."""
    bits = random_bits(NAME, 1 << 20)
    for one, other in ((bits[:-1], bits[1:]), (bits[:-2], bits[2:]), (bits, random_bits("lm_head.weight", len(bits)))):
        for shift in (0, 6, 12):
            classes = ((one >> shift) & 15) * 16 + ((other >> shift) & 15)
            expected = len(classes) / 256
            chi = float(((np.bincount(classes, minlength=256) - expected) ** 2 / expected).sum())
            assert abs(chi - 255) < 6 * math.sqrt(2 * 255)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what a device would have to launch: no views, no memory alone, no constant that is made once."""

    _FREE = ("empty", "view", "slice", "_unsafe", "detach", "as_strided", "split", "alias", "expand", "full", "promote")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(self._FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_operations_that_a_device_is_given_are_few(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda *loops: False)
    base, aligned = numbers(64, 32, dtype=dtype), numbers(64, 32, seed=1, dtype=dtype)
    dest = torch.empty_like(aligned)
    with Operations() as operations, torch.no_grad():
        random = noise(Selection.flat(10, 2048), key(), CPU).view(64, 32)
        combine_unchecked(dest, {"base": base, "aligned": aligned}, dtype, 0.5, random)
    assert len(operations.names) <= MOST_KERNELS[dtype], operations.names


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3, 0.5, 1.0])
def test_small_steps_arrive(tmp_path: Path, alpha: float) -> None:
    """Steps of one unit in the last place: nearest swallows them or makes them whole."""
    base = numbers(256, 512)
    bits = base.view(torch.int16).clone()
    bits[::3] += 1
    aligned = bits.view(torch.bfloat16)
    step = aligned.double() - base.double()
    arrived: dict[str, float] = {}
    for rounding in ("nearest", "dithered"):
        lazy = Lazies(tmp_path / rounding).make(base, aligned, alpha, rounding=rounding).lazy
        moved = lazy.materialize().double() - aligned.double()
        arrived[rounding] = float((moved * step).sum() / (alpha * (step * step).sum()))
    assert abs(arrived["dithered"] - 1) < 0.1
    assert arrived["nearest"] == pytest.approx(0 if alpha < 0.5 else 1 / alpha, abs=0.2) or alpha == 0.5


def test_device_without_a_stage_gets_the_hosts_result(tmp_path: Path) -> None:
    """Its random bits are drawn where the operands are, not where the result goes."""
    pending = Lazies(tmp_path).make(numbers(8, 8), numbers(8, 8, seed=1), 0.5, rounding="dithered").lazy.pending
    dest = torch.empty(8, 8, dtype=torch.bfloat16, device="meta")
    for part, selection, recipe in pending.parts(dest, Selection.of(pending.whole)):
        Fill(part, selection, recipe, pending.session)()
