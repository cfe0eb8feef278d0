"""Whatever a model does with a lazy tensor gives the bits that a plain tensor would give."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expo_serve.config import Method
from expo_serve.errors import CheckpointError, ValuesError
from expo_serve.load.counts import Counts
from expo_serve.load.lazy import LazyTensor, lazy_tensor
from expo_serve.load.reader import Reader
from expo_serve.load.session import LoadSession
from tests.load.lazies import NAME, Case, Lazies, numbers
from tests.models.raw import same_bits


@pytest.fixture
def lazies(tmp_path: Path) -> Lazies:
    return Lazies(tmp_path)


@pytest.fixture(params=["nearest", "dithered"])
def case(lazies: Lazies, request: pytest.FixtureRequest) -> Case:
    """6 rows of 8 in bf16 at alpha 0.5."""
    return lazies.make(numbers(6, 8), numbers(6, 8, seed=1), rounding=request.param)


def copied(lazy: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What arrives in a parameter that a lazy tensor is copied to."""
    dest = torch.full(lazy.shape, 7, dtype=dtype or lazy.dtype)
    assert dest.copy_(lazy) is dest
    return dest


@pytest.mark.parametrize("rounding", ["nearest", "dithered"])
@pytest.mark.parametrize("alpha", [-1, 0, 0.5, 1.7])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("aligned", [torch.float32, torch.bfloat16, torch.float16])
def test_copy_gives_the_extrapolated_bits(
    lazies: Lazies, base: torch.dtype, aligned: torch.dtype, alpha: float, rounding: Method
) -> None:
    sides = numbers(6, 8, dtype=base), numbers(6, 8, seed=1, dtype=aligned)
    made = lazies.make(*sides, alpha, rounding=rounding)
    assert same_bits(copied(made.lazy), made.expected)
    assert same_bits(made.lazy.materialize(), made.expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_dest_of_another_dtype_gets_a_cast(case: Case, dtype: torch.dtype) -> None:
    assert same_bits(copied(case.lazy, dtype), case.expected.to(dtype))


def test_lazy_tensor_looks_like_the_aligned_one(case: Case) -> None:
    assert (case.lazy.shape, case.lazy.dtype, case.lazy.device.type) == ((6, 8), torch.bfloat16, "cpu")
    assert case.lazy.is_contiguous()
    assert len(case.lazy) == 6
    assert NAME in repr(case.lazy)
    assert isinstance(case.lazy.data, LazyTensor)
    assert case.counts.kinds == {}


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "add": lambda t: t + 1,
    "cat": lambda t: torch.cat([t, t]),
    "stack": lambda t: torch.stack([t[0], t[1]]),
    "float": lambda t: t.float(),
    "to": lambda t: t.to(torch.float16),
    "clone of a part": lambda t: t[:, 2:5].clone(),
    "clone of rows": lambda t: t[2:4].clone(),
    "contiguous clone of repeated elements": lambda t: t.expand(2, 6, 8).clone(memory_format=torch.contiguous_format),
    "contiguous windows": lambda t: t.unfold(0, 2, 1).contiguous(),
    "reshape of a transpose": lambda t: t.t().reshape(-1),
    "flip": lambda t: t.flip(0),
    "repeat": lambda t: t.repeat(2, 1),
    "repeat_interleave": lambda t: t.repeat_interleave(2, 0),
    "index": lambda t: t[torch.tensor([3, 1])],
    "mask": lambda t: t[torch.tensor([True, False] * 3)],
    "index_select": lambda t: t.index_select(1, torch.tensor([2])),
    "view as another dtype": lambda t: t.view(torch.int16),
    "matmul": lambda t: t @ t.t(),
    "pad": lambda t: torch.nn.functional.pad(t, (0, 1)),
    "where": lambda t: torch.where(t > 0, t, -t),
    "chunks joined": lambda t: torch.cat(t.chunk(2, dim=1)[::-1], dim=1),
    "out": lambda t: torch.add(t, t, out=torch.empty(6, 8, dtype=torch.bfloat16)),
    "copy into a dest by foreach": lambda t: _foreach_copied(t),
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "torch.save": lambda t: _saved(t),
    "tensor of a list": lambda t: torch.tensor(t.tolist(), dtype=t.dtype),
    "items": lambda t: torch.tensor([[value.item() for value in row] for row in t], dtype=t.dtype),
    "numpy": lambda t: torch.from_numpy(t.float().numpy()),
    "numpy of a view": lambda t: torch.from_numpy(np.asarray(t.float()[1:, ::2])),
    "equal": lambda t: torch.tensor(torch.equal(t, t.clone())),
    "negation view": lambda t: torch._neg_view(t),
}


def _foreach_copied(tensor: torch.Tensor) -> torch.Tensor:
    dest = torch.empty(6, 8, dtype=torch.bfloat16)
    torch._foreach_copy_([dest], [tensor])
    return dest


def _saved(tensor: torch.Tensor) -> Any:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_operation_that_wants_values_gets_them(case: Case, read: Callable[[torch.Tensor], Any]) -> None:
    found = read(case.lazy)
    assert same_bits(found if type(found) is torch.Tensor else copied(found), read(case.expected))
    assert not case.counts.kinds or case.counts.count()["materialized"] == 1


def test_numpy_and_array_of_fp32(lazies: Lazies) -> None:
    made = lazies.make(numbers(3, 4, dtype=torch.float32), numbers(3, 4, seed=1, dtype=torch.float32))
    for found in (made.lazy.numpy(), np.asarray(made.lazy), np.array(made.lazy, dtype=np.float32)):
        assert found.tobytes() == made.expected.numpy().tobytes()


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "add_": lambda t: t.add_(1),
    "mul_ by itself": lambda t: t.mul_(t),
    "copy_": lambda t: t.copy_(torch.ones(6, 8)),
    "copy_ of itself": lambda t: t.copy_(t.flip(0)),
    "zero_ of a row": lambda t: t[2].zero_(),
    "slice": lambda t: t[1:3, ::2].fill_(5),
    "setitem": lambda t: t.__setitem__((0, 0), 9.0),
    "index_fill_": lambda t: t.index_fill_(1, torch.tensor([1]), 3.0),
    "out": lambda t: torch.add(torch.ones(6, 8), 1, out=t.view(6, 8)),
    "foreach": lambda t: torch._foreach_add_([t[:2]], 1),
    "twice": lambda t: t.add_(1).t().mul_(2),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_write_into_a_lazy_tensor_stays(case: Case, write: Callable[[torch.Tensor], object]) -> None:
    before = case.lazy[2:]
    write(case.lazy)
    write(case.expected)
    assert same_bits(copied(case.lazy), case.expected)
    assert same_bits(copied(before), case.expected[2:])


PARTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "columns": lambda t: t[:, 2:5],
    "transpose": torch.t,
    "every second row": lambda t: t[::2],
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("write", [lambda t: t, lambda t: t[0].fill_(7), lambda t: t.add_(1).t().mul_(2)])
def test_contiguous_clone_stays_lazy(
    case: Case, part: Callable[[torch.Tensor], torch.Tensor], write: Callable[[torch.Tensor], object]
) -> None:
    clone, expected = part(case.lazy).contiguous(), part(case.expected).contiguous()
    assert isinstance(clone, LazyTensor)
    assert case.counts.count()["materialized"] == 0
    chunk = clone.chunk(2)[1]
    write(clone)
    write(expected)
    for lazy, plain in ((clone, expected), (chunk, expected.chunk(2)[1]), (clone.view(-1), expected.view(-1))):
        assert lazy.stride() == plain.stride()
        assert same_bits(copied(lazy), plain)
    assert same_bits(copied(clone.view(torch.int16)), expected.view(torch.int16))
    assert same_bits(copied(case.lazy), case.expected)


@pytest.mark.parametrize("view", [lambda t: t.expand(2, 6, 8), lambda t: t.unfold(0, 2, 1)], ids=["expand", "windows"])
def test_clone_of_repeated_elements_is_real(case: Case, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert not isinstance(view(case.lazy).contiguous(), LazyTensor)


@pytest.mark.parametrize("view", [lambda t: t, torch.t], ids=["whole", "transpose"])
def test_clone_stays_lazy(case: Case, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    clone, expected = view(case.lazy).clone(), view(case.expected).clone()
    assert isinstance(clone, LazyTensor)
    assert clone.stride() == expected.stride()
    assert same_bits(copied(clone), expected)
    assert case.counts.count()["materialized"] == 0


def test_write_into_a_clone_or_its_origin_stays_there(case: Case) -> None:
    clone = case.lazy.clone()
    clone.add_(1)
    assert same_bits(copied(case.lazy), case.expected)
    second = clone.clone()
    clone.zero_()
    assert same_bits(copied(second), case.expected + 1)
    case.lazy.zero_()
    assert same_bits(copied(second), case.expected + 1)


def test_in_place_operation_returns_the_lazy_tensor(case: Case) -> None:
    assert case.lazy.add_(1) is case.lazy


def test_operation_that_would_change_the_shape_in_place_is_refused(case: Case) -> None:
    with pytest.raises(NotImplementedError, match=NAME):
        case.lazy.t_()


@pytest.mark.parametrize("alpha", [-1, 0, 0.5])
def test_grown_rows_are_aligneds(lazies: Lazies, alpha: float) -> None:
    aligned = numbers(9, 8, seed=1)
    made = lazies.make(numbers(6, 8), aligned, alpha)
    assert same_bits(copied(made.lazy), made.expected)
    assert same_bits(copied(made.lazy[6:]), aligned[6:])
    assert same_bits(copied(made.lazy[7]), aligned[7])
    assert same_bits(copied(made.lazy[2:8, 1::3]), made.expected[2:8, 1::3])
    assert same_bits(copied(made.lazy.view(-1)[45:50]), made.expected.view(-1)[45:50])


def test_copy_broadcasts_as_torch_does(case: Case) -> None:
    dest = torch.empty(3, 6, 8, dtype=torch.bfloat16)
    assert same_bits(dest.copy_(case.lazy), case.expected.expand(3, 6, 8).clone())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_copy_of_another_shape_is_refused_as_torch_does(case: Case, device: str) -> None:
    with pytest.raises(RuntimeError, match=r"must match|expanded size"):
        torch.empty(5, 8, device=device).copy_(case.lazy)


def test_meta_dest_reads_and_counts_nothing(case: Case) -> None:
    torch.empty(6, 8, device="meta").copy_(case.lazy)
    assert (dict(case.counts.read_bytes), case.counts.kinds) == ({}, {})
    assert same_bits(copied(case.lazy), case.expected)
    assert case.counts.read_bytes == {"base": 96, "aligned": 96}


@pytest.mark.parametrize(
    ("alpha", "read"), [(0.5, {"base": 96, "aligned": 144}), (0, {"aligned": 144}), (-1, {"base": 96, "aligned": 48})]
)
def test_bytes_are_those_that_the_plan_foretold(lazies: Lazies, alpha: float, read: dict[str, int]) -> None:
    made = lazies.make(numbers(6, 8), numbers(9, 8, seed=1), alpha)
    copied(made.lazy)
    assert made.counts.read_bytes == read
    assert {"base": 0, **read} == made.lazy._pending.planned.read_bytes


def test_shard_reads_its_own_bytes_only(case: Case) -> None:
    copied(case.lazy.narrow(1, 0, 4))
    assert case.counts.read_bytes == {"base": 48, "aligned": 48}


def test_kinds_are_counted_once(lazies: Lazies) -> None:
    tensors = {NAME: numbers(4, 2), "b.weight": numbers(3), "ids": torch.arange(4)}
    plan = lazies.plan(tensors, tensors)
    counts = Counts()
    loaded = {name: lazy_tensor(tensor, LoadSession(Reader(), counts)) for name, tensor in plan.tensors.items()}
    for row in loaded[NAME]:
        copied(row)
    copied(loaded["b.weight"] + 1)
    copied(loaded["b.weight"])
    copied(loaded["ids"])
    assert counts.count() == {"extrapolated": 1, "materialized": 1, "copied": 1}


@pytest.mark.parametrize(
    ("side", "alpha", "row"), [("base", 0.5, 1), ("aligned", 0.5, 1), ("base", -1, 1), ("aligned", -1, 7)]
)
def test_value_that_is_not_finite_names_tensor_and_file(lazies: Lazies, side: str, alpha: float, row: int) -> None:
    operands = {"base": numbers(6, 8), "aligned": numbers(9, 8, seed=1)}
    operands[side][row, 3] = torch.nan
    made = lazies.make(operands["base"], operands["aligned"], alpha)
    with pytest.raises(ValuesError, match=rf"'{NAME}' in .*/{side}/model.safetensors holds NaN"):
        copied(made.lazy)
    copied(made.lazy[:1])


def test_result_that_is_too_large_says_so(lazies: Lazies) -> None:
    made = lazies.make(torch.full((2, 2), -6e4).half(), torch.full((2, 2), 6e4).half(), 2)
    with pytest.raises(ValuesError, match="alpha 2 it is too large for its dtype"):
        copied(made.lazy)


def test_file_that_is_gone_is_a_checkpoint_error(lazies: Lazies) -> None:
    plan = lazies.plan({NAME: numbers(2, 2)}, {NAME: numbers(2, 2)})
    Path(plan.base.source.path, "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"'{NAME}' cannot be read"):
        lazy_tensor(plan.tensors[NAME], LoadSession(Reader(), Counts()))
