"""The compiled loops: the bits and bytes of the slow way, and the slow way where there is no compiler."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expo_serve.kernels import bf16 as fused
from expo_serve.kernels import reading as gather
from expo_serve.kernels.native import compiled
from expo_serve.load import formula as extrapolate
from expo_serve.load.formula import NotFiniteError
from tests.load.combining import extrapolate_into
from tests.load.lazies import Lazies, numbers
from tests.models.raw import same_bits

EVERY = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)


@pytest.fixture(params=["native", "python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of each test: with the compiled loop, and as where it cannot be compiled."""
    if request.param == "python":
        monkeypatch.setattr(gather, "_native", lambda: None)
        monkeypatch.setattr(extrapolate, "fused", lambda: None)
    else:
        assert gather._native() is not None
    return str(request.param)


def test_this_machine_has_the_loops() -> None:
    """Everything below would pass without them."""
    assert fused.fused() is not None


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(0, 200),
    weight=st.one_of(st.floats(-101, 101), st.sampled_from([0.5, -0.5, 1 + 1e-9, 0.49999999])),
)
def test_any_finite_bf16_values_give_the_bits_of_torch(seed: int, size: int, weight: float) -> None:
    loops = fused.fused()
    assert loops
    generator = torch.Generator().manual_seed(seed)
    finite = EVERY[EVERY.isfinite()]
    base, aligned = (finite[torch.randint(len(finite), (size,), generator=generator)] for _ in range(2))
    expected, found = torch.lerp(base, aligned, weight), torch.full((size,), 7.0, dtype=torch.bfloat16)
    is_finite = loops.combine(base, aligned, found, weight)
    kept = expected.isfinite()
    assert same_bits(found[kept], expected[kept])
    assert is_finite == bool(kept.all())


@pytest.mark.parametrize("place", [0, 1, 63, 64, 99])
@pytest.mark.parametrize("side", ["base", "aligned"])
def test_every_nan_and_infinity_is_noticed(side: str, place: int) -> None:
    loops = fused.fused()
    assert loops
    for bad in EVERY[~EVERY.isfinite()]:
        sides = {name: torch.ones(100, dtype=torch.bfloat16) for name in ("base", "aligned")}
        sides[side][place] = bad
        assert not loops.combine(sides["base"], sides["aligned"], torch.empty(100, dtype=torch.bfloat16), 1.5)


def test_memory_that_no_vector_is_aligned_to(way: str) -> None:
    base, aligned = torch.randn(1000).bfloat16(), torch.randn(1000).bfloat16()
    for start in range(35):
        out = torch.full((1000,), 7.0, dtype=torch.bfloat16)
        extrapolate_into(out[start:-1], base[start:-1], aligned[start:-1], 0.5)
        assert same_bits(out[start:-1], torch.lerp(base, aligned, 1.5)[start:-1])
        assert [float(out[at]) for at in {start - 1, 999} if at >= 0] == [7.0] * (2 if start else 1)


def test_a_loop_with_other_bits_is_not_used() -> None:
    def wrong(base: torch.Tensor, aligned: torch.Tensor, out: torch.Tensor, weight: float) -> bool:
        out.copy_(torch.lerp(base, aligned, weight))
        out[-1].mul_(1.01)
        return bool(out.isfinite().all())

    def careless(base: torch.Tensor, aligned: torch.Tensor, out: torch.Tensor, weight: float) -> bool:
        out.copy_(torch.lerp(base, aligned, weight))
        return True

    assert not fused._agrees_with_torch(wrong)
    assert not fused._agrees_with_torch(careless)


def test_whoever_looks_through_all_modules_finds_objects() -> None:
    """vLLM asks everything that modules hold for its ``__dict__`` when an engine begins, and wants one."""
    assert fused.fused()
    for module in [module for name, module in sys.modules.items() if name.startswith("llvmlite.")]:
        for value in vars(module).values():
            assert not hasattr(value, "__dict__") or isinstance(vars(value), (dict, MappingProxyType))


def test_without_a_compiler_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    assert compiled(fused._IR, fused._SIGNATURES) is None
    monkeypatch.setattr(extrapolate, "fused", lambda: None)
    base, aligned = torch.randn(1000).bfloat16(), torch.randn(1000).bfloat16()
    out = torch.empty_like(base)
    extrapolate_into(out, base, aligned, 0.5)
    assert same_bits(out, torch.lerp(base, aligned, 1.5))
    base[500] = torch.nan
    with pytest.raises(NotFiniteError, match="base"):
        extrapolate_into(out, base, aligned, 0.5)


@pytest.mark.parametrize("done", [0, 2, 30, 94, 96])
def test_what_a_loop_that_stops_early_leaves_is_done_the_plain_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """A read may give less than was asked for: nothing is wrong then."""
    stream, given = fused.Fused.stream, []

    def stop_early(
        loops: fused.Fused, base: fused.Place, aligned: fused.Place, out: torch.Tensor, weight: float, is_delta: bool
    ) -> int:
        given.append(stream(loops, base, aligned, out.view(-1)[: done // 2], weight) if done else 0)
        return given[-1]

    monkeypatch.setattr(fused.Fused, "stream", stop_early)
    case = Lazies(tmp_path).make(numbers(6, 8), numbers(6, 8, seed=1))
    dest = torch.full((6, 8), 7.0, dtype=torch.bfloat16)
    assert same_bits(dest.copy_(case.lazy), case.expected)
    assert given == [done]
    assert case.lazy._pending.session.reader.activity.read_bytes == 2 * 96


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A thousand bytes; a descriptor."""
    (tmp_path / "data").write_bytes(bytes(index % 251 for index in range(1000)))
    descriptor = os.open(tmp_path / "data", os.O_RDWR)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_runs_are_read_one_behind_the_other(file: int, way: str, size: int) -> None:
    offsets = np.array([900, 0, 7, 7, 500])
    memory = bytearray(size * len(offsets))
    gather.read_runs(file, memoryview(memory), offsets)
    assert bytes(memory) == b"".join(os.pread(file, size, offset) for offset in offsets)


def test_offsets_with_strides_are_taken_in_their_order(file: int, way: str) -> None:
    memory = bytearray(6)
    gather.read_runs(file, memoryview(memory), np.arange(0, 600, 100)[::-1])
    assert list(memory) == [index % 251 for index in range(500, -1, -100)]


def test_an_end_in_the_middle_is_an_error(file: int, way: str) -> None:
    with pytest.raises(EOFError):
        gather.read_runs(file, memoryview(bytearray(30)), np.array([0, 500, 995]))


def test_a_system_error_keeps_its_cause(file: int, way: str) -> None:
    closed = os.dup(file)
    os.close(closed)
    with pytest.raises(OSError, match="Bad file descriptor"):
        gather.read_runs(closed, memoryview(bytearray(30)), np.array([0, 10, 20]))
