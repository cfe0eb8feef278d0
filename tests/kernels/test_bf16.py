"""The loop that combines bf16 values: the bits of torch, and a notice of every value that is not finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expo_serve import kernels
from expo_serve.kernels.bf16 import combine
from expo_serve.load.dtypes import uint16_bits
from expo_serve.load.formula import NotFiniteError, combine_into, combine_unchecked
from tests.kernels.arrays import EVERY, FINITE, NEAREST, combined
from tests.load.combining import extrapolate_into
from tests.models.raw import same_bits

WEIGHTS = st.one_of(st.floats(-101, 101), st.sampled_from([0.5, -0.5, 1 + 1e-9, 0.49999999]))


def test_this_machine_has_the_loop() -> None:
    """Everything below would pass without it."""
    assert kernels.available("bf16.combine"), kernels.reason()


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), size=st.integers(0, 200), weight=WEIGHTS)
def test_any_finite_bf16_values_give_the_bits_of_torch(seed: int, size: int, weight: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    base, aligned = (FINITE[torch.randint(len(FINITE), (size,), generator=generator)] for _ in range(2))
    expected, found = torch.lerp(base, aligned, weight), torch.full((size,), 7.0, dtype=torch.bfloat16)
    is_finite = combined(base, aligned, found, weight)
    kept = expected.isfinite()
    assert same_bits(found[kept], expected[kept])
    assert is_finite == bool(kept.all())


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), size=st.integers(0, 200), alpha=st.floats(-101, 101))
def test_delta_is_added_with_one_rounding(seed: int, size: int, alpha: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=generator).bfloat16()
    delta = (0.01 * torch.randn(size, generator=generator)).bfloat16()
    found, expected = torch.empty_like(base), torch.empty_like(base)
    assert combine(uint16_bits(base), uint16_bits(delta), uint16_bits(found), 1 + alpha, False, True, NEAREST)
    combine_unchecked(expected, {"base": base, "delta": delta}, torch.bfloat16, alpha)
    assert same_bits(found, expected)


@pytest.mark.parametrize("place", [0, 1, 63, 64, 99])
@pytest.mark.parametrize("side", ["base", "aligned"])
def test_every_nan_and_infinity_is_noticed(side: str, place: int) -> None:
    for bad in EVERY[~EVERY.isfinite()]:
        sides = {name: torch.ones(100, dtype=torch.bfloat16) for name in ("base", "aligned")}
        sides[side][place] = bad
        assert not combined(sides["base"], sides["aligned"], torch.empty(100, dtype=torch.bfloat16), 1.5)


def test_memory_that_no_vector_is_aligned_to(way: str) -> None:
    base, aligned = torch.randn(1000).bfloat16(), torch.randn(1000).bfloat16()
    for start in range(35):
        out = torch.full((1000,), 7.0, dtype=torch.bfloat16)
        extrapolate_into(out[start:-1], base[start:-1], aligned[start:-1], 0.5)
        assert same_bits(out[start:-1], torch.lerp(base, aligned, 1.5)[start:-1])
        assert [float(out[at]) for at in {start - 1, 999} if at >= 0] == [7.0] * (2 if start else 1)


def test_parameter_that_requires_a_gradient_is_written_to(way: str) -> None:
    base, aligned = torch.randn(100).bfloat16(), torch.randn(100).bfloat16()
    parameter = torch.nn.Parameter(torch.zeros(100, dtype=torch.bfloat16))
    with torch.no_grad():
        combine_into(parameter, {"base": base, "aligned": aligned}, torch.bfloat16, 0.5)
    assert same_bits(parameter.data, torch.lerp(base, aligned, 1.5))


def test_value_that_is_not_finite_is_named_both_ways(way: str) -> None:
    base, aligned = torch.randn(1000).bfloat16(), torch.randn(1000).bfloat16()
    base[500] = torch.nan
    with pytest.raises(NotFiniteError, match="base"):
        extrapolate_into(torch.empty_like(base), base, aligned, 0.5)


def test_loop_takes_no_other_types() -> None:
    """They would be compiled anew, in the midst of a load."""
    halves = uint16_bits(torch.ones(10).bfloat16())
    with pytest.raises(TypeError, match="No matching definition"):
        combine(halves.astype("u4"), halves, halves, 0.5, True, False, halves[:0])
    with pytest.raises(TypeError, match="No matching definition"):
        combine(halves[::2], halves[:5], halves[5:], 0.5, True, False, halves[:0])
