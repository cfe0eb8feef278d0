"""The rules of the pair, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expo_serve.checkpoint.folder import Checkpoint, open_checkpoint
from expo_serve.checkpoint.records import Operand
from expo_serve.config import ExpoConfig, Source
from expo_serve.errors import ConfigError, PairError, UsageError, count_of
from expo_serve.plan.pair import plan_pair
from expo_serve.plan.plan import Plan
from expo_serve.plan.prepare import pin, prepare
from tests.models.raw import tiny_tensors, write_pair, write_raw

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM = "model.layers.0.input_layernorm.weight"
UP = "model.layers.0.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


class Pairs:
    """Plans pairs of tensors; the configs are those of a small Llama but for what is given."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def plan(
        self,
        base: Tensors | None = None,
        aligned: Tensors | None = None,
        *,
        base_config: dict[str, Any] | None = None,
        aligned_config: dict[str, Any] | None = None,
        **options: Any,
    ) -> Plan:
        config = ExpoConfig(**{"base": "b", "alpha": 0.5, **options})
        self.aligned = self._open("aligned", aligned, aligned_config)
        return plan_pair(self._open("base", base, base_config), self.aligned, config)

    def _open(self, operand: Operand, tensors: Tensors | None, config: dict[str, Any] | None) -> Checkpoint:
        folder = write_raw(self._folder / operand, tensors, **(config or {}))
        return open_checkpoint(operand, Source(name=operand, path=str(folder)))


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    return Pairs(tmp_path)


def changed(**tensors: torch.Tensor | None) -> Tensors:
    """The small Llama's tensors; ``__`` in a name stands for a dot, None takes one away."""
    given = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in {**tiny_tensors(), **given}.items() if tensor is not None}


@pytest.mark.parametrize(("number", "found"), [(0, "0 tensors"), (1, "1 tensor"), (2, "2 tensors")])
def test_count_agrees_with_its_noun(number: int, found: str) -> None:
    assert count_of(number, "tensor") == found
    assert count_of(number, "module is", "modules are") == f"{number} {'module is' if number == 1 else 'modules are'}"


def test_floats_of_one_shape_are_extrapolated(pairs: Pairs) -> None:
    plan = pairs.plan()
    assert len(plan.extrapolated) == 8
    assert plan.copied == []
    assert (plan.warnings, plan.alphas, plan.grown) == ((), {"0.5": 8}, {})
    assert plan.read_bytes == {"base": plan.weight_bytes, "aligned": plan.weight_bytes}


def test_floats_of_other_dtypes_are_extrapolated(pairs: Pairs) -> None:
    plan = pairs.plan(tiny_tensors(dtype=torch.float32))
    assert len(plan.extrapolated) == 8
    assert plan.read_bytes == {"base": 2 * plan.weight_bytes, "aligned": plan.weight_bytes}


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integers_are_copied_from_aligned(pairs: Pairs, dtype: torch.dtype) -> None:
    ids = torch.ones(4).to(dtype)
    both, aligned_only = changed(ids=ids), changed()
    for base, aligned, copied in ((both, both, 1), (aligned_only, both, 1), (both, aligned_only, 0)):
        plan = pairs.plan(base, aligned)
        assert [tensor.name for tensor in plan.copied] == ["ids"] * copied
        assert not plan.ignored_base
        assert not plan.copied_unmatched


@pytest.mark.parametrize("side", ["base", "aligned"])
@pytest.mark.parametrize("unmatched", ["refuse", "copy"])
def test_float_on_one_side_and_integer_on_the_other_is_refused(pairs: Pairs, side: str, unmatched: str) -> None:
    other = changed(lm_head__weight=torch.ones(16, 8).to(torch.int8))
    with pytest.raises(PairError, match="shape or kind differs in 1 of 8 tensors") as caught:
        pairs.plan(**{side: other}, unmatched=unmatched)
    assert "I8 [16, 8]" in caught.value.details[0]
    assert "BF16 [16, 8]" in caught.value.details[0]


def test_more_vocabulary_on_the_aligned_side_is_planned_with_one_warning(pairs: Pairs) -> None:
    plan = pairs.plan(aligned=tiny_tensors(vocabulary=18), aligned_config={"vocab_size": 18})
    assert plan.grown == {EMBED: 2, HEAD: 2}
    assert len(plan.warnings) == 1
    assert "+2 rows" in plan.warnings[0]
    assert plan.tensors[EMBED].read_bytes == {"base": 16 * 8 * 2, "aligned": 18 * 8 * 2}


@pytest.mark.parametrize(("alpha", "read"), [(0, {"base": 0, "aligned": 288}), (-1, {"base": 256, "aligned": 32})])
def test_side_that_is_not_used_is_not_read(pairs: Pairs, alpha: float, read: dict[str, int]) -> None:
    plan = pairs.plan(aligned=tiny_tensors(vocabulary=18), alpha=alpha)
    assert plan.tensors[EMBED].read_bytes == read


def test_bias_of_the_output_grows_with_the_vocabulary(pairs: Pairs) -> None:
    aligned = {**tiny_tensors(vocabulary=18), "lm_head.bias": torch.zeros(18)}
    assert pairs.plan(changed(lm_head__bias=torch.zeros(16)), aligned).grown["lm_head.bias"] == 2


def test_tensor_named_otherwise_grows_when_both_configs_name_its_rows(pairs: Pairs) -> None:
    base, aligned = changed(odd__table=torch.zeros(16, 8)), changed(odd__table=torch.zeros(18, 8))
    with pytest.raises(PairError):
        pairs.plan(base, aligned)
    aligned = {**tiny_tensors(vocabulary=18), "odd.table": torch.zeros(18, 8)}
    assert pairs.plan(base, aligned).grown["odd.table"] == 2


def test_hidden_tensor_does_not_grow_because_its_rows_number_the_vocabulary(pairs: Pairs) -> None:
    other = changed(**{UP.replace(".", "__"): torch.zeros(16, 8)})
    with pytest.raises(PairError, match="1 of 8"):
        pairs.plan(aligned=other)


@pytest.mark.parametrize("vocabulary", [15, 8])
def test_of_a_larger_vocabulary_in_base_the_last_rows_are_not_used(pairs: Pairs, vocabulary: int) -> None:
    plan = pairs.plan(aligned=tiny_tensors(vocabulary=vocabulary), aligned_config={"vocab_size": vocabulary})
    base = plan.tensors[EMBED].base
    assert base is not None
    assert (base.shape, plan.grown) == ((vocabulary, 8), {})
    assert plan.warnings[0].startswith("aligned has a smaller vocabulary than base: base's last rows are not used: ")
    assert f"{EMBED} (-{16 - vocabulary} row" in plan.warnings[0]


@pytest.mark.parametrize("side", ["base", "aligned"])
def test_rows_that_the_own_config_does_not_name_are_refused(pairs: Pairs, side: str) -> None:
    wrong: dict[str, Any] = {f"{side}_config": {"vocab_size": 17}}
    with pytest.raises(PairError, match="shape or kind differs in 2 of 8 tensors"):
        pairs.plan(aligned=tiny_tensors(vocabulary=18), **wrong)
    with pytest.raises(PairError, match="shape or kind differs in 1 of 8 tensors") as caught:
        pairs.plan(**wrong)
    assert "vocab_size" in caught.value.details[0]


@pytest.mark.parametrize("tied", [True, None])
def test_output_that_only_aligned_stores_is_paired_with_the_tied_embedding(pairs: Pairs, tied: bool | None) -> None:
    plan = pairs.plan(changed(lm_head__weight=None), base_config={"tie_word_embeddings": tied})
    partner = plan.tensors[HEAD].base
    assert partner is not None
    assert partner.name == EMBED


def test_output_that_only_base_stores_is_the_tied_embedding(pairs: Pairs) -> None:
    tied = {"tie_word_embeddings": True}
    plan = pairs.plan(aligned=changed(lm_head__weight=None), base_config=tied, aligned_config=tied)
    assert HEAD not in plan.tensors
    assert plan.ignored_base == ()


@pytest.mark.parametrize("side", ["base", "aligned"])
def test_output_on_one_side_of_an_untied_pair_is_refused(pairs: Pairs, side: str) -> None:
    with pytest.raises(PairError, match="1 tensor is in one checkpoint only"):
        pairs.plan(**{side: changed(lm_head__weight=None)})


def test_output_missing_of_an_untied_aligned_model_is_refused_whatever_base_says(pairs: Pairs) -> None:
    with pytest.raises(PairError, match="1 tensor is in one checkpoint only"):
        pairs.plan(aligned=changed(lm_head__weight=None), base_config={"tie_word_embeddings": True})


def test_one_sided_tensors_are_refused_and_counted(pairs: Pairs) -> None:
    with pytest.raises(
        PairError, match=r"17 tensors are in one checkpoint only \(15 in aligned, 2 in base\)"
    ) as caught:
        pairs.plan(changed(x=torch.zeros(1), y=torch.zeros(2)), tiny_tensors(layers=7))
    assert len(caught.value.details) == 17
    assert caught.value.detail_lines()[10:] == ["... and 7 more"]
    assert "only in base: y [2]" in caught.value.details


def test_one_sided_tensors_are_copied_or_ignored_when_asked_for(pairs: Pairs) -> None:
    plan = pairs.plan(changed(x=torch.zeros(1), y=torch.zeros(2)), changed(z=torch.zeros(3)), unmatched="copy")
    assert (plan.copied_unmatched, plan.ignored_base) == (("z",), ("x", "y"))
    assert [tensor.name for tensor in plan.copied] == ["z"]
    assert plan.read_bytes["aligned"] == plan.weight_bytes
    assert len(plan.warnings) == 1


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "h.0.attn.masked_bias", "embeddings.position_ids"]
)
def test_leftovers_never_matter(pairs: Pairs, name: str) -> None:
    plain = tiny_tensors()
    small, large = {**plain, name: torch.ones(2)}, {**plain, name: torch.ones(3)}
    for base, aligned in ((plain, large), (large, plain), (small, large), (large, small)):
        plan = pairs.plan(base, aligned)
        assert (plan.copied_unmatched, plan.ignored_base, plan.warnings) == ((), (), ())
        assert len(plan.extrapolated) == 8


@pytest.mark.parametrize("shape", [(9,), (8, 1), (), (1, 8)])
@pytest.mark.parametrize("unmatched", ["refuse", "copy"])
def test_any_other_shape_is_refused_with_both_shapes(pairs: Pairs, shape: tuple[int, ...], unmatched: str) -> None:
    with pytest.raises(PairError, match="shape or kind differs in 1 of 8 tensors") as caught:
        pairs.plan(aligned=changed(**{NORM.replace(".", "__"): torch.zeros(shape)}), unmatched=unmatched)
    assert caught.value.details == (f"{NORM}: base BF16 [8], aligned F32 {list(shape)}",)


def test_sizes_of_the_configs_explain_the_shapes(pairs: Pairs) -> None:
    with pytest.raises(PairError, match=r"\(hidden_size is 8 in base and 16 in aligned\)"):
        pairs.plan(aligned=tiny_tensors(hidden=16), aligned_config={"hidden_size": 16})


@pytest.mark.parametrize("config", [{"model_type": "qwen2"}, {"architectures": ["Other"]}])
def test_other_architecture_is_refused(pairs: Pairs, config: dict[str, Any]) -> None:
    with pytest.raises(PairError, match="different architectures"):
        pairs.plan(aligned_config=config)


@pytest.mark.parametrize("vocabulary", ["16", [16], None, {}])
def test_odd_vocabulary_size_in_a_config_is_no_crash(pairs: Pairs, vocabulary: Any) -> None:
    assert pairs.plan(aligned_config={"vocab_size": vocabulary, "text_config": {"vocab_size": vocabulary}}).tensors


def test_rules_give_the_first_alpha_that_matches(pairs: Pairs) -> None:
    rules = ["embed|lm_head=0", "embed|norm=-1", r"\.mlp\.=1.5"]
    plan = pairs.plan(alpha_rules=rules)
    assert plan.alphas == {"0.5": 2, "0": 2, "-1": 2, "1.5": 2}
    assert plan.tensors[EMBED].alpha == 0


def test_rule_that_matches_nothing_is_refused(pairs: Pairs) -> None:
    with pytest.raises(UsageError, match="'nothing=1' matches no tensor"):
        pairs.plan(alpha_rules=["norm=1", "nothing=1"])


def test_prepared_and_pinned_pair_is_the_same_pair(tmp_path: Path) -> None:
    base, aligned = write_pair(tmp_path)
    config = ExpoConfig(base=str(base), aligned=str(aligned), alpha=0.5)
    plan = prepare(config)
    pinned = pin(config, plan, started=1.0)
    again = ExpoConfig.model_validate_json(pinned.model_dump_json(exclude_defaults=True))
    assert again == pinned
    assert prepare(again).tensors == plan.tensors


def test_aligned_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="aligned is missing"):
        prepare(ExpoConfig(base=str(tmp_path), alpha=0.5))
