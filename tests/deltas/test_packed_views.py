"""What models and ranks do with the tensors of a packed delta: parts, turned, into other dtypes, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expo_serve.errors import ValuesError
from expo_serve.load.blocks import TABLE
from expo_serve.load.counts import Counts
from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.reader import Reader
from expo_serve.load.session import LoadSession
from expo_serve.load.threads import Background
from tests.load.lazies import numbers
from tests.load.test_pipeline import Parameters
from tests.models.packs import EMBED, HEAD, SMALL_BLOCK, UP, Pack, Packs, blocks_of
from tests.models.raw import same_bits

CUBE, WIDE = "model.experts.weight", "model.wide.weight"
NAMES = [UP, CUBE, WIDE, EMBED]
ROWS, COLUMNS = 40, 24
View = Callable[[torch.Tensor], torch.Tensor]
VIEWS: dict[str, View] = {
    "whole": lambda t: t,
    "rows of whole blocks": lambda t: t.narrow(0, 8, 16),
    "rows from within a block": lambda t: t.narrow(0, 5, 17),
    "rows within one block": lambda t: t.narrow(0, 1, 1),
    "the last rows": lambda t: t[-3:],
    "no rows": lambda t: t[2:2],
    "columns": lambda t: t.narrow(1, 3, 7),
    "one column": lambda t: t[:, 5],
    "transposed": lambda t: t.transpose(0, 1),
    "columns of the transposed": lambda t: t.transpose(0, 1).narrow(1, 7, 9),
    "flat, cut": lambda t: t.reshape(-1)[63:130],
    "one value": lambda t: t.reshape(-1)[64],
    "every third row": lambda t: t[1::3],
    "repeated": lambda t: t[:1].expand(4, *t.shape[1:]),
}


def moved(base: torch.Tensor, seed: int) -> torch.Tensor:
    """A third of the values a small step away."""
    step = 0.02 * numbers(*base.shape, seed=seed) * (numbers(*base.shape, seed=seed + 1) > 0.4)
    return (base + step).to(base.dtype)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pack]:
    """A matrix, a cube, one with another dtype in base, and one whose rows have grown within a block."""
    base = {UP: numbers(ROWS, COLUMNS), CUBE: numbers(26, 12, 3), EMBED: numbers(20, 11)}
    aligned = {name: moved(tensor, number) for number, (name, tensor) in enumerate(base.items(), 3)}
    aligned[EMBED] = torch.cat([aligned[EMBED], numbers(7, 11, seed=9)])
    base[WIDE] = numbers(30, 11, dtype=torch.float32)
    aligned[WIDE] = moved(base[WIDE], 11).half()
    with blocks_of(SMALL_BLOCK):
        yield Packs(tmp_path_factory.mktemp("views")).make(base, aligned, aligned_config={"vocab_size": 27})


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("alpha", [-1, 0, 0.5])
def test_view_is_that_of_the_pair(pack: Pack, view: View, alpha: float) -> None:
    for name in NAMES:
        expected = view(pack.expected(name, alpha))
        for dtype in (expected.dtype, torch.float32):
            dest = torch.full(expected.shape, 7.0, dtype=dtype)
            assert same_bits(dest.copy_(view(pack.lazy(name, alpha))), expected.to(dtype)), (name, dtype)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_view_goes_where_memory_has_strides(pack: Pack, view: View) -> None:
    expected = view(pack.expected(UP))
    around = torch.full((*expected.shape, 2), 7.0, dtype=torch.bfloat16)
    around[..., 0].copy_(view(pack.lazy(UP)))
    assert same_bits(around[..., 0], expected)
    assert (around[..., 1] == 7).all()


@settings(deadline=None, max_examples=60)
@given(data=st.data(), name=st.sampled_from(NAMES), alpha=st.sampled_from([-1, 0, 0.5]))
def test_any_part(pack: Pack, data: st.DataObject, name: str, alpha: float) -> None:
    lazy: torch.Tensor = pack.lazy(name, alpha)
    expected = pack.expected(name, alpha)
    for dim, size in enumerate(expected.shape):
        start = data.draw(st.integers(0, size - 1))
        length = data.draw(st.integers(1, size - start))
        lazy, expected = lazy.narrow(dim, start, length), expected.narrow(dim, start, length)
    assert same_bits(torch.empty_like(expected).copy_(lazy), expected)


@pytest.mark.parametrize("alpha", [-1, 0, 0.5])
def test_models_may_ask_for_values(pack: Pack, alpha: float) -> None:
    lazy, expected = pack.lazy(UP, alpha), pack.expected(UP, alpha)
    assert same_bits(lazy + 1, expected + 1)
    assert same_bits(torch.cat([lazy, lazy]), torch.cat([expected, expected]))
    assert lazy[3, 4].item() == expected[3, 4].item()


@pytest.mark.parametrize("alpha", [-1, 0, 0.5])
def test_threads_give_the_same(pack: Pack, alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expo_serve.load.sizes.BLOCK_BYTES", 200)
    plan, reader = pack.by_delta(alpha), Reader()
    model = Parameters(plan)
    with Background(model, threads=3) as background:
        for name, parameter in model.filled.items():
            parameter.copy_(lazy_tensor(plan.tensors[name], LoadSession(reader, Counts(), background.submit)))
        background.wait()
    for name, parameter in model.filled.items():
        assert same_bits(parameter, pack.expected(name, alpha))


@pytest.mark.parametrize("ranks", [2, 4, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rank_reads_the_blocks_of_its_rows_alone(pack: Pack, ranks: int, dtype: torch.dtype) -> None:
    """40 rows of 24 values are 15 blocks; a rank's rows begin and end within blocks, or do not."""
    planned = pack.by_delta(0.5).tensors[UP]
    blocks = ROWS * COLUMNS // SMALL_BLOCK
    tables, shard = blocks * TABLE.itemsize, ROWS // ranks
    for rank in range(ranks):
        counts, reader = Counts(), Reader()
        dest = torch.empty(shard, COLUMNS, dtype=dtype)
        dest.copy_(lazy_tensor(planned, LoadSession(reader, counts)).narrow(0, rank * shard, shard))
        first, last = rank * shard * COLUMNS // SMALL_BLOCK, ((rank + 1) * shard * COLUMNS - 1) // SMALL_BLOCK
        assert counts.read_bytes["base"] == (last + 1 - first) * SMALL_BLOCK * 2
        assert tables < counts.read_bytes["delta"] < planned.records[-1].nbytes
        assert reader.activity.read_bytes == sum(counts.read_bytes.values())


def test_ranks_together_read_all_once_where_blocks_are_whole(pack: Pack) -> None:
    planned, counts = pack.by_delta(0.5).tensors[UP], Counts()
    for rank in range(5):
        torch.empty(8, COLUMNS, dtype=torch.bfloat16).copy_(
            lazy_tensor(planned, LoadSession(Reader(), counts)).narrow(0, 8 * rank, 8)
        )
    tables = planned.read_bytes["delta"] - _packed_bytes(pack)
    assert counts.read_bytes == {"base": ROWS * COLUMNS * 2, "delta": _packed_bytes(pack) + 5 * tables}


def _packed_bytes(pack: Pack) -> int:
    record = pack.by_delta(0.5).tensors[UP].records[-1]
    return record.nbytes - ROWS * COLUMNS // SMALL_BLOCK * TABLE.itemsize


def test_other_base_is_noticed_wherever_it_is_read(pack: Pack, tmp_path: Path) -> None:
    """One value of base is another: what lies in other blocks is loaded, at every alpha the rest is not."""
    content = bytearray((pack.base / "model.safetensors").read_bytes())
    record = pack.open_base().tensors[UP]
    content[record.offset + 2 * 20 * COLUMNS] ^= 1
    other = tmp_path / "base"
    other.mkdir()
    (other / "config.json").write_bytes((pack.base / "config.json").read_bytes())
    (other / "model.safetensors").write_bytes(content)
    over = Pack(other, pack.aligned, pack.delta, "refuse")
    for alpha in (-1, 0, 0.5):
        for view in (VIEWS["whole"], VIEWS["columns"], lambda t: t[20], lambda t: t.float()):
            with pytest.raises(ValuesError, match=rf"made against \(base\).*'{UP}' in {other}") as caught:
                torch.empty_like(view(pack.expected(UP))).copy_(view(over.lazy(UP, alpha)))
            assert "give that base" in caught.value.message
        for rows in (VIEWS["the last rows"], VIEWS["rows within one block"]):
            assert same_bits(rows(over.lazy(UP, alpha)).clone(), rows(pack.expected(UP, alpha)))
    assert HEAD not in over.by_delta(0).tensors
