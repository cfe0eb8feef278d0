"""The formula and its one rounding, against a reference that shares no code with it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expo_serve.load.formula import NotFiniteError
from expo_serve.load.selection import Selection, cut
from expo_serve.load.sizes import PIECE_BYTES
from tests.load.combining import extrapolate_into
from tests.models.raw import same_bits

PIECE_ELEMENTS = PIECE_BYTES // 2
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
ALPHAS = [-1.0, -0.5, 0.0, 0.5, 1.7, 1e-7, -3.0, 20.0]


def reference(base: torch.Tensor, aligned: torch.Tensor, alpha: float) -> torch.Tensor:
    """The number rule of the design, written out."""
    if alpha == 0:
        return aligned.clone()
    if alpha == -1:
        return base.to(aligned.dtype)
    wide = torch.float64 if torch.float64 in (base.dtype, aligned.dtype) else torch.float32
    return torch.lerp(base.to(wide), aligned.to(wide), 1 + alpha).to(aligned.dtype)


def sides(*shape: int, base: torch.dtype, aligned: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random operands; some values are equal, some zero, with both signs."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(*shape, generator=generator, dtype=torch.float64)
    after = before + 0.02 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    before.view(-1)[::7] = -0.0
    after.view(-1)[::14] = 0.0
    after.view(-1)[7::14] = -0.0
    return before.to(base), after.to(aligned)


def result(base: torch.Tensor | None, aligned: torch.Tensor, alpha: float) -> torch.Tensor:
    dest = torch.empty_like(aligned, memory_format=torch.contiguous_format)
    extrapolate_into(dest, base, aligned, alpha)
    return dest


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("aligned_dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", DTYPES)
def test_bits_are_those_of_one_rounding(base_dtype: torch.dtype, aligned_dtype: torch.dtype, alpha: float) -> None:
    base, aligned = sides(1013, base=base_dtype, aligned=aligned_dtype)
    assert same_bits(result(base, aligned, alpha), reference(base, aligned, alpha))


@pytest.mark.parametrize("dtype", DTYPES)
def test_formula_is_that_of_the_paper(dtype: torch.dtype) -> None:
    """Within the one rounding of the result: the reference above could be wrong the same way as the code."""
    base, aligned = sides(1000, base=dtype, aligned=dtype)
    exact = aligned.double() + 1.7 * (aligned.double() - base.double())
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * 8 if dtype != torch.float64 else 0.0)
    assert torch.all((result(base, aligned, 1.7).double() - exact).abs() <= 4 * eps * (1 + exact.abs()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_alpha_0_and_minus_1_copy_every_bit(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = [0.0, -0.0, largest, -largest, torch.finfo(dtype).tiny, -1.5]
    base = torch.tensor([a for a in values for _ in values], dtype=dtype)
    aligned = torch.tensor([b for _ in values for b in values], dtype=dtype)
    assert same_bits(result(base, aligned, 0.0), aligned)
    assert same_bits(result(base, aligned, -0.0), aligned)
    assert same_bits(result(base, aligned, -1.0), base)
    assert same_bits(result(None, aligned, 0.5), aligned)


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_finite_values_that_agree_stay(dtype: torch.dtype) -> None:
    largest = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min] * 50, dtype=dtype)
    assert same_bits(result(largest, largest.clone(), 0.5), largest)


@settings(deadline=None, max_examples=60)
@given(
    limit=st.integers(1, 50),
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=4),
    permutation=st.randoms(use_true_random=False),
    dtype=st.sampled_from(DTYPES),
)
def test_pieces_and_strides_never_change_a_bit(
    limit: int, shape: list[int], permutation: st.DrawFn, dtype: torch.dtype
) -> None:
    base, aligned = sides(*shape, base=torch.bfloat16, aligned=dtype) if shape else _scalars(dtype)
    order = list(range(len(shape)))
    permutation.shuffle(order)  # type: ignore[attr-defined]
    expected = reference(base, aligned, 0.5).permute(order)
    out = torch.empty_like(expected, memory_format=torch.contiguous_format)
    for dest, one, other in pieces(out, base.permute(order), aligned.permute(order), limit=limit):
        assert dest.numel() <= limit
        extrapolate_into(dest, one, other, 0.5)
    assert same_bits(out, expected)


def pieces(dest: torch.Tensor, *sides: torch.Tensor, limit: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Matching pieces of a destination and of operands with strides of one kind."""
    for out, piece in cut(dest, Selection.of(sides[0]), limit):
        yield out, *(side.as_strided(piece.shape, piece.stride, piece.offset) for side in sides)


def _scalars(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(0.75).to(torch.bfloat16), torch.tensor(0.8).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_large_strided_views_have_the_bits_of_the_whole(dtype: torch.dtype, step: int) -> None:
    base, aligned = sides(3, PIECE_ELEMENTS + 4097, base=dtype, aligned=dtype)
    expected = reference(base, aligned, 0.5)
    for view in (
        lambda t: t[:, ::step],
        lambda t: t[1:, 5::step],
        lambda t: t.t()[::step],
        lambda t: t.view(-1)[step:],
    ):
        wanted = view(expected)  # type: ignore[no-untyped-call]
        dest = torch.full_like(wanted, torch.nan)
        extrapolate_into(dest, view(base), view(aligned), 0.5)  # type: ignore[no-untyped-call]
        assert same_bits(dest, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_have_the_bits_of_the_whole(dtype: torch.dtype) -> None:
    base, aligned = sides(400_003, base=dtype, aligned=dtype)
    dest = torch.empty_like(aligned)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(_at_half, pieces(dest, base, aligned, limit=9973)))
    assert same_bits(dest, reference(base, aligned, 0.5))


def _at_half(part: tuple[torch.Tensor, ...]) -> None:
    dest, base, aligned = part
    extrapolate_into(dest, base, aligned, 0.5)


@pytest.mark.parametrize("dest_dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_dest_of_another_dtype_is_a_cast_of_the_rounded_result(
    base_dtype: torch.dtype, dest_dtype: torch.dtype
) -> None:
    base, aligned = sides(513, base=base_dtype, aligned=torch.bfloat16)
    for alpha in ALPHAS:
        dest = torch.empty(513, dtype=dest_dtype)
        extrapolate_into(dest, base, aligned, alpha)
        assert same_bits(dest, reference(base, aligned, alpha).to(dest_dtype))


def test_integers_are_copied() -> None:
    aligned = torch.tensor([2**53 + 1, -1, 0])
    assert same_bits(result(None, aligned, 0.5), aligned)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_empty_tensor_is_no_error(shape: tuple[int, ...]) -> None:
    assert result(torch.empty(shape), torch.empty(shape), 0.5).shape == shape


WHERE = [0, 1, 4095, PIECE_ELEMENTS - 1, PIECE_ELEMENTS, PIECE_ELEMENTS + 776]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    ("side", "alpha"), [("base", 0.5), ("aligned", 0.5), ("aligned", 0.0), ("base", -1.0), ("base", 1e-7)]
)
def test_value_that_is_not_finite_is_found_anywhere(side: str, alpha: float, where: int, bad: float) -> None:
    operands = {name: torch.ones(PIECE_ELEMENTS + 777, dtype=torch.bfloat16) for name in ("base", "aligned")}
    operands[side][where] = bad
    with pytest.raises(NotFiniteError, match=f"^{side}$"):
        result(operands["base"], operands["aligned"], alpha)


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_operand_that_is_not_used_may_hold_anything(alpha: float) -> None:
    nan, ones = torch.full((4,), torch.nan), torch.ones(4)
    base, aligned = (nan, ones) if alpha == 0 else (ones, nan)
    assert same_bits(result(base, aligned, alpha), ones)


def test_result_too_large_for_its_dtype_is_the_results_fault() -> None:
    base, aligned = torch.tensor([-60000.0]), torch.tensor([60000.0])
    with pytest.raises(NotFiniteError, match=r"^result$"):
        result(base.half(), aligned.half(), 0.5)


def test_base_too_large_for_aligneds_dtype_is_not_a_damaged_base() -> None:
    with pytest.raises(NotFiniteError, match=r"^result$"):
        result(torch.tensor([1e6]), torch.tensor([1.0], dtype=torch.float16), -1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_finite_values_with_an_infinite_sum_are_no_alarm(dtype: torch.dtype, alpha: float) -> None:
    values = torch.full((1000,), torch.finfo(dtype).max / 2, dtype=dtype)
    assert not values.sum().isfinite()
    assert same_bits(result(values, values.clone(), alpha), values)
