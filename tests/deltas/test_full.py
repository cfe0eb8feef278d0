"""A checkpoint of differences: the sum is written out a second time here, in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expo_serve.errors import PairError
from expo_serve.load.counts import Counts
from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.reader import Reader
from expo_serve.load.session import LoadSession
from expo_serve.plan.plan import Plan
from tests.models.adapters import plan_delta
from tests.models.raw import same_bits, tiny_tensors, write_raw

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM, UP = "model.layers.0.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALPHAS = [-1, 0, 0.5, 8]
Tensors = dict[str, torch.Tensor]


class Sums:
    """Plans deltas over bases; the configs are those of a small Llama but for what is given."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def plan(
        self,
        base: Tensors,
        delta: Tensors,
        alpha: float = 0.5,
        *,
        base_config: dict[str, Any] | None = None,
        delta_config: dict[str, Any] | None = None,
        **options: Any,
    ) -> Plan:
        """With ``delta_config`` the delta has a config.json."""
        folders = write_raw(self._folder / "base", base, **(base_config or {})), self._folder / "delta"
        write_raw(folders[1], delta, **(delta_config or {}))
        if delta_config is None:
            (folders[1] / "config.json").unlink()
        return plan_delta(*folders, alpha, **options)


@pytest.fixture
def sums(tmp_path: Path) -> Sums:
    return Sums(tmp_path)


def differences(dtype: torch.dtype = torch.bfloat16, *, hidden: int = 8, vocabulary: int = 16) -> Tensors:
    """A small step for every tensor of the small Llama."""
    tensors = tiny_tensors(1, hidden=hidden, vocabulary=vocabulary)
    return {name: (tensor.float() / 50).to(dtype) for name, tensor in tensors.items()}


def odd_pair(base_dtype: torch.dtype, delta_dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """Base and delta of sizes that no vector divides."""
    base = tiny_tensors(dtype=base_dtype, hidden=67, vocabulary=301)
    return base, differences(delta_dtype, hidden=67, vocabulary=301)


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def materialized(plan: Plan, counts: Counts | None = None) -> Tensors:
    """Every tensor of the result."""
    reader, counts = Reader(), counts or Counts()
    return {
        name: lazy_tensor(tensor, LoadSession(reader, counts)).materialize() for name, tensor in plan.tensors.items()
    }


def added(base: torch.Tensor, delta: torch.Tensor, alpha: float) -> torch.Tensor:
    """The number rule: in fp64, where products of fp32 values are exact, to fp32, to base's dtype."""
    if alpha == -1:
        return base.clone()
    weight = np.float64(np.float32(1 + alpha))
    wide = base.float().numpy().astype(np.float64) + weight * delta.float().numpy().astype(np.float64)
    return torch.from_numpy(wide.astype(np.float32)).to(base.dtype)


def assert_same(found: Tensors, expected: Tensors) -> None:
    """All names, all bits."""
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("delta_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base_dtype", DTYPES, ids=str)
def test_numbers_are_those_of_the_rule(
    sums: Sums, base_dtype: torch.dtype, delta_dtype: torch.dtype, alpha: float
) -> None:
    base, delta = odd_pair(base_dtype, delta_dtype)
    base[UP][:3], delta[UP][:2] = -0.0, -0.0
    plan, counts = sums.plan(base, delta, alpha), Counts()
    assert_same(materialized(plan, counts), {name: added(base[name], delta[name], alpha) for name in base})
    assert dict(counts.read_bytes) == {side: count for side, count in plan.read_bytes.items() if count}
    assert plan.read_bytes["delta"] == (0 if alpha == -1 else sum(tensor.nbytes for tensor in delta.values()))


@pytest.mark.parametrize("delta_dtype", DTYPES, ids=str)
def test_views_have_the_bits_of_the_whole(sums: Sums, delta_dtype: torch.dtype) -> None:
    plan = sums.plan(*odd_pair(torch.bfloat16, delta_dtype))
    lazy, whole = lazy_tensor(plan.tensors[EMBED], LoadSession(Reader(), Counts())), materialized(plan)[EMBED]
    assert same_bits(torch.empty(67, 301, dtype=torch.bfloat16).copy_(lazy.t()), whole.t())
    assert same_bits(torch.empty(9, 11, dtype=torch.bfloat16).copy_(lazy[100:109, 50:61]), whole[100:109, 50:61])


def test_tensor_that_the_delta_lacks_is_unchanged(sums: Sums) -> None:
    base, delta = tiny_tensors(), without(differences(), NORM, HEAD)
    plan = sums.plan(base, delta)
    assert set(plan.unchanged) == {NORM, HEAD}
    found = materialized(plan)
    assert_same({name: found[name] for name in (NORM, HEAD)}, {name: base[name] for name in (NORM, HEAD)})
    assert same_bits(found[UP], added(base[UP], delta[UP], 0.5))


def bare(tensors: Tensors) -> Tensors:
    """As a body that was saved alone."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("side", ["base", "delta"])
def test_names_with_one_prefix_less_are_paired(sums: Sums, side: str) -> None:
    base, delta = without(tiny_tensors(), HEAD), without(differences(), HEAD)
    expected = {name: added(base[name], delta[name], 0.5) for name in base}
    if side == "base":
        base, expected = bare(base), bare(expected)
    else:
        delta = bare(delta)
    plan = sums.plan(base, delta, base_config={"tie_word_embeddings": True})
    assert plan.unchanged == ()
    assert_same(materialized(plan), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_integers_are_those_of_base(sums: Sums, dtype: torch.dtype, alpha: float) -> None:
    ids = torch.tensor([0, 1, 1]).to(dtype)
    for other in (torch.tensor([1, 1, 0]).to(dtype), torch.ones(5).to(dtype)):
        plan = sums.plan({**tiny_tensors(), "ids": ids}, {**differences(), "ids": other}, alpha)
        assert same_bits(materialized(plan)["ids"], ids)
        assert plan.unchanged == ("ids",)


@pytest.mark.parametrize("there", ["base", "delta", "both"])
def test_leftovers_are_those_of_base(sums: Sums, there: str) -> None:
    base, delta = tiny_tensors(), differences()
    if there != "delta":
        base[INV_FREQ] = torch.full((4,), torch.inf)
    if there != "base":
        delta[INV_FREQ] = torch.full((7,), torch.nan)
    plan = sums.plan(base, delta)
    assert plan.warnings == ()
    expected = {name: added(base[name], delta[name], 0.5) for name in without(base, INV_FREQ)}
    assert_same(materialized(plan), {name: expected.get(name, tensor) for name, tensor in base.items()})


def test_output_that_is_the_embedding_in_base_is_ignored(sums: Sums) -> None:
    base, delta = without(tiny_tensors(), HEAD), differences()
    plan = sums.plan(base, delta, base_config={"tie_word_embeddings": True})
    assert_same(materialized(plan), {name: added(base[name], delta[name], 0.5) for name in base})
    assert len(plan.warnings) == 1
    assert HEAD in plan.warnings[0]


def test_output_that_an_untied_base_lacks_is_refused(sums: Sums) -> None:
    with pytest.raises(PairError, match=f"1 tensor that base .* lacks, the first {HEAD}"):
        sums.plan(without(tiny_tensors(), HEAD), differences())


def test_rules_give_alphas(sums: Sums) -> None:
    base, delta = tiny_tensors(), differences()
    found = materialized(sums.plan(base, delta, alpha_rules=["embed=-1", r"\.mlp\.=8"]))
    for name, alpha in ((EMBED, -1), (UP, 8), (NORM, 0.5)):
        assert same_bits(found[name], added(base[name], delta[name], alpha))


def test_tensor_that_base_lacks_is_refused(sums: Sums) -> None:
    with pytest.raises(PairError, match=r"2 tensors that base .* lacks, the first a\.b") as caught:
        sums.plan(tiny_tensors(), {**differences(), "a.b": torch.ones(3), "c": torch.ones(2)})
    assert caught.value.details == ("only in delta: a.b [3]", "only in delta: c [2]")


@pytest.mark.parametrize("alpha", ALPHAS)
def test_tensor_that_base_lacks_is_taken_over_when_asked_for(sums: Sums, alpha: float) -> None:
    more = torch.tensor([1.5, -0.0, 3.0])
    plan = sums.plan(tiny_tensors(), {**differences(), "a.b": more}, alpha, unmatched="copy")
    assert plan.copied_unmatched == plan.added == ("a.b",)
    assert same_bits(materialized(plan)["a.b"], more)


def test_delta_of_which_base_has_nothing_is_refused_always(sums: Sums) -> None:
    strange = {f"x.{name}.y": tensor for name, tensor in differences().items()}
    with pytest.raises(PairError, match=r"8 tensors that base .* lacks"):
        sums.plan(tiny_tensors(), strange, unmatched="copy")


@pytest.mark.parametrize("unmatched", ["refuse", "copy"])
@pytest.mark.parametrize("other", [torch.zeros(16, 9), torch.zeros(17, 8), torch.zeros(128), torch.zeros(8, 16)])
def test_other_shape_is_refused(sums: Sums, other: torch.Tensor, unmatched: str) -> None:
    with pytest.raises(PairError, match="shape or kind differs in 1 of 8 tensors") as caught:
        sums.plan(tiny_tensors(), {**differences(), HEAD: other}, unmatched=unmatched)
    assert caught.value.details == (f"{HEAD}: base BF16 [16, 8], delta F32 {list(other.shape)}",)


@pytest.mark.parametrize("side", ["base", "delta"])
def test_integers_against_floats_are_refused(sums: Sums, side: str) -> None:
    base, delta = tiny_tensors(), differences()
    {"base": base, "delta": delta}[side][HEAD] = torch.ones(16, 8).to(torch.int8)
    with pytest.raises(PairError, match="shape or kind differs in 1 of 8 tensors") as caught:
        sums.plan(base, delta)
    assert f"{side} I8 [16, 8]" in caught.value.details[0]


@pytest.mark.parametrize("config", [{"model_type": "qwen2"}, {"architectures": ["Other"]}])
def test_other_architecture_is_refused(sums: Sums, config: dict[str, Any]) -> None:
    with pytest.raises(PairError, match="different architectures"):
        sums.plan(tiny_tensors(), differences(), delta_config=config)


@pytest.mark.parametrize("config", [{}, {"architectures": None}, {"architectures": ["LlamaModel"]}, {"vocab_size": 17}])
def test_config_of_the_same_kind_or_of_none_is_fine(sums: Sums, config: dict[str, Any]) -> None:
    base, delta = tiny_tensors(), differences()
    found = materialized(sums.plan(base, delta, delta_config=config))
    assert_same(found, {name: added(base[name], delta[name], 0.5) for name in base})


def test_whole_checkpoint_in_place_of_a_delta_is_doubted(sums: Sums) -> None:
    whole = {**tiny_tensors(1), NORM: torch.full((8,), 1.1).bfloat16()}
    base = {**tiny_tensors(), NORM: torch.ones(8).bfloat16()}
    names = [name for name in base if name.endswith("layernorm.weight") and name != NORM]
    for name in names:
        base[name] = whole[name] = torch.ones(8).bfloat16()
    with pytest.raises(PairError, match=r"like a whole checkpoint.* give it as --aligned .*--allow whole-checkpoint"):
        sums.plan(base, whole)
    steps = {name: tensor / 50 for name, tensor in whole.items()}
    assert (sums.plan(base, steps).warnings, sums.plan(base, steps).doubts) == ((), ())


def test_delta_without_some_tensors_is_a_warning(sums: Sums) -> None:
    (warning,) = sums.plan(tiny_tensors(), {UP: differences()[UP]}).warnings
    assert "lacks 7 of base's 8 tensors" in warning
    assert "is the delta complete?" in warning


def test_output_of_an_untied_delta_over_a_tied_base_is_refused(sums: Sums) -> None:
    base = {name: tensor for name, tensor in tiny_tensors().items() if name != HEAD}
    with pytest.raises(PairError, match=r"output of its own \(lm_head.weight"):
        sums.plan(
            base,
            differences(),
            base_config={"tie_word_embeddings": True},
            delta_config={"tie_word_embeddings": False},
        )


def test_parts_without_elements_are_copied(sums: Sums) -> None:
    plan = sums.plan({**tiny_tensors(), "empty": torch.ones(0, 8)}, {**differences(), "empty": torch.ones(0, 8)})
    lazy = lazy_tensor(plan.tensors["empty"], LoadSession())
    assert torch.ones(0, 8).copy_(lazy).shape == (0, 8)
    rows = lazy_tensor(plan.tensors[UP], LoadSession(Reader(), Counts()))
    assert torch.ones(0, 8).bfloat16().copy_(rows[12:]).shape == (0, 8)
