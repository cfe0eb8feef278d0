"""Chains of views on a lazy tensor select what they select on a plain one: hypothesis looks for one that does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expo_serve.load.lazy import LazyTensor
from tests.load.lazies import Case, Lazies, numbers
from tests.models.raw import same_bits

View = Callable[[torch.Tensor], torch.Tensor]
Draw = Callable[..., Any]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Tensors of one to three dimensions; those with two have a grown vocabulary or not."""
    lazies = Lazies(tmp_path_factory.mktemp("lazies"))
    shapes = [((12, 8), (12, 8)), ((9, 8), (12, 8)), ((1, 6), (5, 6)), ((24,), (24,)), ((4, 6, 2), (4, 6, 2))]
    made = [
        lazies.make(numbers(*base), numbers(*aligned, seed=1), alpha) for base, aligned in shapes for alpha in (-1, 0.5)
    ]
    return [*made, lazies.make(numbers(9, 8, dtype=torch.float32), numbers(12, 8, seed=1, dtype=torch.float16))]


def _dim(draw: Draw, shape: torch.Size) -> int:
    dim: int = draw(st.integers(0, len(shape) - 1))
    return dim


def _narrow(draw: Draw, shape: torch.Size) -> View:
    dim = _dim(draw, shape)
    start = draw(st.integers(0, shape[dim]))
    length = draw(st.integers(0, shape[dim] - start))
    return lambda t: t.narrow(dim, start, length)


def _chunk(draw: Draw, shape: torch.Size) -> View:
    dim, parts, pick = _dim(draw, shape), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    return lambda t: t.chunk(parts, dim)[min(pick, len(t.chunk(parts, dim)) - 1)]


def _split(draw: Draw, shape: torch.Size) -> View:
    dim = _dim(draw, shape)
    first = draw(st.integers(0, shape[dim]))
    pick = draw(st.integers(0, 1))
    return lambda t: torch.split(t, [first, shape[dim] - first], dim)[pick]


def _select(draw: Draw, shape: torch.Size) -> View:
    dim = _dim(draw, shape)
    index = draw(st.integers(0, shape[dim] - 1)) if shape[dim] else 0
    return (lambda t: t.select(dim, index)) if shape[dim] else (lambda t: t)


def _unbind(draw: Draw, shape: torch.Size) -> View:
    dim = _dim(draw, shape)
    index = draw(st.integers(0, shape[dim] - 1)) if shape[dim] else 0
    return (lambda t: t.unbind(dim)[index]) if shape[dim] else (lambda t: t)


def _transpose(draw: Draw, shape: torch.Size) -> View:
    one, other = _dim(draw, shape), _dim(draw, shape)
    return (lambda t: t.t()) if len(shape) == 2 else (lambda t: t.transpose(one, other))


def _permute(draw: Draw, shape: torch.Size) -> View:
    order = draw(st.permutations(range(len(shape))))
    return lambda t: t.permute(order)


def _reshape(draw: Draw, shape: torch.Size) -> View:
    """A view where the strides allow it, else a copy: both must have the same bits."""
    size = shape.numel()
    parts = [n for n in (1, 2, 3, 4, 6, 8) if size and size % n == 0]
    rows = draw(st.sampled_from(parts or [1]))
    return (lambda t: t.reshape(rows, -1)) if size else (lambda t: t)


def _flat_view(draw: Draw, shape: torch.Size) -> View:
    return lambda t: t.view(-1) if t.is_contiguous() else t.flatten(-1)


def _expand(draw: Draw, shape: torch.Size) -> View:
    times = draw(st.integers(1, 3))
    return lambda t: t.unsqueeze(0).expand(times, *t.shape)


def _unsqueeze(draw: Draw, shape: torch.Size) -> View:
    dim = draw(st.integers(0, len(shape)))
    return lambda t: t.unsqueeze(dim)


def _squeeze(draw: Draw, shape: torch.Size) -> View:
    return lambda t: t.squeeze()


def _slice(draw: Draw, shape: torch.Size) -> View:
    parts = tuple(
        slice(draw(st.integers(-size - 1, size + 1)), draw(st.integers(-size - 1, size + 1)), draw(st.integers(1, 3)))
        for size in shape
    )
    return lambda t: t[parts]


def _diagonal(draw: Draw, shape: torch.Size) -> View:
    offset = draw(st.integers(-2, 2))
    return (lambda t: t.diagonal(offset)) if len(shape) == 2 else (lambda t: t)


def _windows(draw: Draw, shape: torch.Size) -> View:
    """Overlapping windows: one element is selected several times."""
    dim = _dim(draw, shape)
    return (lambda t: t.unfold(dim, 2, 1)) if shape[dim] >= 2 else (lambda t: t)


def _relay(draw: Draw, shape: torch.Size) -> View:
    return lambda t: t.contiguous()


_ON_ANY = [_expand, _unsqueeze, _squeeze, _relay]
_ON_DIMENSIONS = [
    *(_narrow, _chunk, _split, _select, _unbind, _transpose, _permute, _reshape, _flat_view),
    *(_slice, _diagonal, _windows),
]


def _draw_view(draw: Draw, tensor: torch.Tensor) -> View:
    makers = _ON_ANY + (_ON_DIMENSIONS if tensor.dim() else [])
    make: Callable[[Draw, torch.Size], View] = draw(st.sampled_from(makers))
    return make(draw, tensor.shape)


@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_chain_of_views_selects_the_same_bits(cases: list[Case], data: st.DataObject) -> None:
    case = cases[data.draw(st.integers(0, len(cases) - 1))]
    expected: torch.Tensor = case.expected
    lazy: torch.Tensor = case.lazy
    for _ in range(data.draw(st.integers(1, 6))):
        view = _draw_view(data.draw, expected)
        expected, lazy = view(expected), view(lazy)
    dest = torch.full(expected.shape, 7, dtype=expected.dtype)
    assert same_bits(dest.copy_(lazy), expected)
    if isinstance(lazy, LazyTensor):
        assert lazy.stride() == expected.stride()
        assert same_bits(lazy.materialize(), expected)


def test_views_stay_lazy(cases: list[Case]) -> None:
    lazy = cases[0].lazy
    views = [lazy.t(), lazy[1:, ::2], lazy.view(-1), *lazy.chunk(2), *lazy.unbind(), lazy.permute(1, 0), lazy.detach()]
    assert all(isinstance(view, LazyTensor) for view in views)
    assert cases[0].lazy._pending.value is None
