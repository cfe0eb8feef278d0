"""A packed delta over its base is the pair, bit for bit, at every alpha: hypothesis looks for one that is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expo_serve import kernels
from expo_serve.load.counts import Counts
from expo_serve.load.dtypes import meta_tensor
from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.reader import Reader
from expo_serve.load.session import LoadSession
from expo_serve.plan.packed_format import BLOCK
from expo_serve.write import packed as packing
from tests.models.packs import (
    EMBED,
    HEAD,
    SMALL_BLOCK,
    UP,
    Packs,
    assert_same_outcomes,
    blocks_of,
    outcomes,
)
from tests.models.raw import same_bits, tiny_tensors

ALPHAS = [-1, 0, 0.5, -0.3, 8]
DTYPES = [torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1,), (7,), (64,), (129,), (0, 5), (5, 0, 2), (), (1, 1), (13, 11), (3, 7, 5), (64, 9), (33, 8, 2)]
SPECIAL = [0.0, -0.0, 1e-40, -1e-40, 5.9e-8, -1e-45, 65504.0, 3.3e38, -3.3e38, 1.0, float(np.float32(2**-133))]


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Packs]:
    """With blocks of 64 values, so that most tensors have several."""
    with blocks_of(SMALL_BLOCK):
        yield Packs(tmp_path_factory.mktemp("packs"))


def draw(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Random numbers, a quarter of them special ones, as far as they are finite in their dtype."""
    values = torch.randn(shape, generator=generator).to(dtype)
    special = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
    special = special[special.isfinite()]
    picked = special[torch.randint(len(special), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.25, picked, values)


def moved(base: torch.Tensor, share: float, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Base in another dtype or the same, some of its values changed a little, some to anything."""
    close = (base.to(dtype).double() * (1 + 0.01 * torch.randn(base.shape, generator=generator))).to(dtype)
    other = draw(tuple(base.shape), dtype, generator)
    near = torch.where(torch.rand(base.shape, generator=generator) < 0.8, close, other)
    result = torch.where(torch.rand(base.shape, generator=generator) < share, near, base.to(dtype))
    return torch.where(result.isfinite(), result, torch.ones((), dtype=dtype))


@settings(deadline=None, max_examples=40)
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    block=st.sampled_from([1, 8, SMALL_BLOCK, BLOCK]),
    seed=st.integers(0, 2**31),
)
def test_any_pair(
    packs: Packs,
    shapes: list[tuple[int, ...]],
    dtypes: tuple[torch.dtype, torch.dtype],
    share: float,
    block: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = {f"t{number}.weight": draw(shape, dtypes[0], generator) for number, shape in enumerate(shapes)}
    aligned = {name: moved(tensor, share, dtypes[1], generator) for name, tensor in base.items()}
    with blocks_of(block):
        pack = packs.make(base, aligned)
    for alpha in ALPHAS:
        assert_same_outcomes(outcomes(pack.by_delta(alpha)), outcomes(pack.by_pair(alpha)))


@pytest.mark.parametrize("alpha", [-0.3, 0, 0.5, -2, 1])
@pytest.mark.parametrize("with_loops", [True, False])
def test_minus_zero_everywhere(packs: Packs, alpha: float, with_loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """lerp makes 0.0 of -0.0 or not, by the sign of the step: where nothing changed, too."""
    generator = torch.Generator().manual_seed(1)
    base, odds = torch.randn(40, 40, generator=generator).bfloat16(), torch.rand(40, 40, generator=generator)
    base[odds < 0.6], base[odds < 0.2] = -0.0, 0.0
    aligned = base.clone()
    aligned[::3] = torch.where(odds[::3] % 0.1 < 0.05, -base[::3], torch.tensor(-0.0, dtype=torch.bfloat16))
    pack = packs.make({UP: base, EMBED: base.clone()}, {UP: aligned, EMBED: base.clone()})
    if not with_loops:
        monkeypatch.setattr(kernels, "available", lambda *_: False)
    assert_same_outcomes(outcomes(pack.by_delta(alpha)), outcomes(pack.by_pair(alpha)))


def test_this_machine_has_the_loops() -> None:
    """The fast way would not be seen without them."""
    assert kernels.available("reading.fetch", "sparse.extrapolate"), kernels.reason()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_grown_vocabulary_and_tied_output(packs: Packs, alpha: float) -> None:
    tied = {"tie_word_embeddings": True}
    base = {name: tensor for name, tensor in tiny_tensors(1).items() if name != HEAD}
    aligned = tiny_tensors(2, vocabulary=21)
    pack = packs.make(base, aligned, base_config=tied, aligned_config={"vocab_size": 21})
    plan = pack.by_delta(alpha)
    assert plan.grown == {EMBED: 5, HEAD: 5}
    assert plan.tensors[HEAD].base is not None
    assert_same_outcomes(outcomes(plan), outcomes(pack.by_pair(alpha)))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_what_is_taken_over(packs: Packs, alpha: float) -> None:
    """Integers, the same and others; a mask of infinity; what only one side has."""
    mask = {"model.layers.0.self_attn.masked_bias": torch.tensor(-torch.inf).bfloat16()}
    same, wide = (
        {"ids": torch.arange(100), "flags": torch.rand(70) < 0.5},
        {"wide": torch.arange(90, dtype=torch.int32)},
    )
    base = {**tiny_tensors(1), **same, **mask, **wide, "old": torch.ones(5)}
    aligned = {
        **tiny_tensors(2),
        **same,
        **mask,
        "wide": torch.arange(90) * 2,
        "new": torch.randn(70),
        "more": torch.arange(100),
    }
    pack = packs.make(base, aligned, unmatched="copy")
    plan, pair = pack.by_delta(alpha), pack.by_pair(alpha)
    assert_same_outcomes(outcomes(plan), outcomes(pair))
    assert (
        (plan.copied_unmatched, plan.ignored_base) == (pair.copied_unmatched, pair.ignored_base) == (("new",), ("old",))
    )
    assert {tensor.name for tensor in plan.copied} == {tensor.name for tensor in pair.copied}


def test_value_head_is_packed_and_left_out_of_loads(packs: Packs) -> None:
    head = {"v_head.summary.weight": torch.ones(1, 8)}
    pack = packs.make(tiny_tensors(1), {**tiny_tensors(2), **head})
    plan = pack.by_delta(0.5)
    assert plan.left_out == tuple(head)
    assert len(plan.warnings) == 1
    assert_same_outcomes(outcomes(plan), outcomes(pack.by_pair(0.5)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_in_base_does_not_matter_where_base_does_not_count(packs: Packs, dtype: torch.dtype) -> None:
    """A cast may give one NaN or another: what is predicted from it must not depend on that."""
    base = torch.randn(1001, generator=torch.Generator().manual_seed(1))
    aligned = base.to(dtype)
    base[50:70], base[500:640], base[-5:] = torch.nan, torch.nan, torch.nan
    pack = packs.make({UP: base}, {UP: aligned})
    assert_same_outcomes(outcomes(pack.by_delta(0)), {UP: aligned})
    assert_same_outcomes(outcomes(pack.by_delta(0.5)), {UP: "not finite"})


def test_rules_hold_for_deltas(packs: Packs) -> None:
    base = tiny_tensors(1)
    pack = packs.make(base, tiny_tensors(2))
    plan = pack.by_delta(0.5, ("embed=-1", "norm=0"))
    found = outcomes(plan)
    assert plan.alphas == {"0.5": 5, "-1": 1, "0": 2}
    expected = {**outcomes(pack.by_pair(0.5)), EMBED: base[EMBED]}
    expected |= {name: value for name, value in outcomes(pack.by_pair(0)).items() if "norm" in name}
    assert_same_outcomes(found, expected)


def test_several_files(packs: Packs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MAX_FILE_BYTES", 400)
    pack = packs.make({**tiny_tensors(1), "none": torch.zeros(0, 8)}, {**tiny_tensors(2), "none": torch.zeros(0, 8)})
    files = sorted(file.name for file in pack.delta.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"delta-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    assert_same_outcomes(outcomes(pack.by_delta(0.5)), outcomes(pack.by_pair(0.5)))


def test_tensors_that_are_base_s_take_their_table_alone(packs: Packs) -> None:
    tensors = {**tiny_tensors(1), "ids": torch.arange(200), "wide": torch.randn(65)}
    plan = packs.make(tensors, tensors).by_delta(0.5)
    for name, tensor in tensors.items():
        assert plan.tensors[name].records[-1].nbytes == 32 * -(-tensor.numel() // SMALL_BLOCK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("noise", [1e-3, 1.0])
def test_noise_takes_no_more_than_the_checkpoint(tmp_path: Path, dtype: torch.dtype, noise: float) -> None:
    """Also where nothing can be gained."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(700, 1000, generator=generator)
    aligned = base * (1 + noise * torch.randn(700, 1000, generator=generator))
    with blocks_of(BLOCK):
        pack = Packs(tmp_path).make({UP: base.to(dtype)}, {UP: aligned.to(dtype)})
    assert pack.file.stat().st_size <= 1.02 * (pack.aligned / "model.safetensors").stat().st_size


def test_random_bits_take_no_more_than_the_checkpoint(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    base, aligned = (torch.randint(-(2**15), 2**15, (600_000,), generator=generator).short() for _ in range(2))
    with blocks_of(BLOCK):
        pack = Packs(tmp_path).make({"ids": base}, {"ids": aligned})
    assert pack.file.stat().st_size <= 1.02 * (pack.aligned / "model.safetensors").stat().st_size
    assert same_bits(pack.lazy("ids").materialize(), aligned)


def test_what_is_read_is_what_is_counted(packs: Packs) -> None:
    pack = packs.make(tiny_tensors(1), tiny_tensors(2))
    for alpha in (-1, 0, 0.5):
        plan, reader, counts = pack.by_delta(alpha), Reader(), Counts()
        for name, planned in plan.tensors.items():
            torch.empty_like(meta_tensor(planned.result), device="cpu").copy_(
                lazy_tensor(planned, LoadSession(reader, counts))
            )
            assert counts.kinds[name] == "extrapolated"
        assert dict(counts.read_bytes) == plan.read_bytes
        assert reader.activity.read_bytes == sum(counts.read_bytes.values())
