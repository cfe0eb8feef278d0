"""The loop that extrapolates base through its changes: the bits of decoding and torch's lerp.

That the other loops decode what was coded is tested in ``tests/load/test_blocks.py``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expo_serve import kernels
from expo_serve.kernels import sparse
from expo_serve.kernels.bf16 import lerp_factor
from expo_serve.load import blocks
from expo_serve.load.blocks import Parts, decompressed
from expo_serve.load.dtypes import signed_bits
from tests.kernels.arrays import EVERY, FINITE
from tests.models.raw import same_bits

WEIGHTS = [1.5, 0.3, -2.0, 9.0, 1.0001]


def parts_of(base: torch.Tensor, aligned: torch.Tensor) -> Parts:
    """Code the changes, also where it would be smaller to store all of it whole."""
    return decompressed(blocks._changes(signed_bits(aligned), signed_bits(base)), base.numel(), 2)


def extrapolated(base: torch.Tensor, parts: Parts, weight: float) -> torch.Tensor | None:
    """Extrapolate by the loop; None where it leaves the work to the plain way."""
    values = base.clone()
    is_done = sparse.extrapolate(
        parts.gaps, parts.small, parts.large, signed_bits(values), *lerp_factor(weight), False, 0, 0
    )
    return values if is_done else None


def test_this_machine_has_the_loop() -> None:
    """Everything below would pass without it."""
    assert kernels.available("sparse.extrapolate"), kernels.reason()


@settings(deadline=None, max_examples=80)
@given(
    size=st.sampled_from([1, 2, 63, 1001, 30_000]),
    share=st.sampled_from([0.0, 0.001, 0.05, 0.15]),
    zeros=st.sampled_from([0.0, 0.3]),
    weight=st.one_of(st.sampled_from(WEIGHTS), st.floats(-10, 10)),
    seed=st.integers(0, 2**31),
)
def test_bits_are_those_of_lerp(size: int, share: float, zeros: float, weight: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=generator).bfloat16()
    base[torch.rand(size, generator=generator) < zeros] = -0.0
    moved = (base.float() * (1 + 0.02 * torch.randn(size, generator=generator))).bfloat16()
    moved[torch.rand(size, generator=generator) < 0.2] = 0.0
    aligned = torch.where(torch.rand(size, generator=generator) < share, moved, base)
    found = extrapolated(base, parts_of(base, aligned), weight)
    assert found is not None
    assert same_bits(found, torch.lerp(base, aligned, weight))


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("step", [0, 1, 2, 96, 253])
def test_every_value_moved_by_a_step(step: int, weight: float) -> None:
    count = FINITE.numel()
    parts = Parts(np.zeros(count, np.uint8), np.full(count, step, np.uint8), np.empty(0, np.int16))
    aligned = FINITE.clone()
    assert sparse.apply16(parts.gaps, parts.small, parts.large, signed_bits(aligned))
    expected = torch.lerp(FINITE, aligned, weight)
    kept = expected.isfinite() & aligned.isfinite()
    for one in (kept, ~kept):
        some = Parts(parts.gaps[: int(one.sum())], parts.small[: int(one.sum())], parts.large)
        found = extrapolated(FINITE[one], some, weight)
        assert found is None if one is not kept and one.any() else found is not None
        if one is kept and found is not None:
            assert same_bits(found, expected[one])


@pytest.mark.parametrize("place", [0, 1, 63, 64, 99])
def test_every_nan_and_infinity_is_noticed(place: int) -> None:
    parts = Parts(np.empty(0, np.uint8), np.empty(0, np.uint8), np.empty(0, np.int16))
    values = torch.ones(100, dtype=torch.bfloat16)
    assert extrapolated(values, parts, 1.5) is not None
    for bad in EVERY[~EVERY.isfinite()]:
        values[place] = bad
        assert extrapolated(values, parts, 1.5) is None


@pytest.mark.parametrize(
    ("gaps", "small", "large"),
    [([98], [0], []), ([95, 0, 0, 0, 0, 0], [0] * 6, []), ([3], [0, 0], []), ([3, 4], [0], []), ([3], [255], []),
     ([3], [0], [9]), ([255], [], [])],
)  # fmt: skip
def test_parts_that_do_not_fit_change_nothing(gaps: list[int], small: list[int], large: list[int]) -> None:
    """Also not beyond the values, whose neighbours in memory belong to others."""
    memory = np.full(97 + 64, 0x3F80, np.int16)
    parts = np.array(gaps, np.uint8), np.array(small, np.uint8), np.array(large, np.int16)
    assert not sparse.extrapolate(*parts, memory[:97], 0.5, True, False, 0, 0)
    assert not sparse.apply16(*parts, memory[:97])
    assert set(memory) == {0x3F80}
