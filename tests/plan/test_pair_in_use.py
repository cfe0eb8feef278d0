"""Pairs as people have them: saved without a head, tied, fused, grown, or with more than the model in them.

``tests/vllm_plugin/test_pairs_in_use.py`` loads them; here it is headers alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expo_serve.config import ExpoConfig
from expo_serve.errors import PairError
from expo_serve.plan.pair import plan_pair
from expo_serve.plan.plan import Plan
from tests.models.raw import tiny_tensors
from tests.plan.test_pair import EMBED, HEAD, Pairs, Tensors, changed

TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
ALONE = {"architectures": ["LlamaModel"]}


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    return Pairs(tmp_path)


def without_head(**tensors: torch.Tensor | None) -> Tensors:
    """The small model's tensors but for its output."""
    return changed(lm_head__weight=None, **tensors)


def bare(prefix: str = "model.") -> Tensors:
    """What saving the body alone gives: no head, and the names without ``prefix``."""
    return {name.removeprefix("model."): tensor for name, tensor in without_head().items()}


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors within a larger model."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def base_name(plan: Plan, name: str) -> str | None:
    """The tensor of base that the one of aligned is extrapolated from."""
    partner = plan.tensors[name].base
    return partner.name if partner else None


# Grown vocabularies and tied outputs


@pytest.mark.parametrize("rows", [18, 64])
@pytest.mark.parametrize("head", [True, False])
def test_vocabulary_grows_by_tokens_and_by_padding(pairs: Pairs, rows: int, head: bool) -> None:
    tensors = tiny_tensors(vocabulary=rows)
    if not head:
        del tensors[HEAD]
    tied = {"tie_word_embeddings": not head}
    base = None if head else without_head()
    plan = pairs.plan(base, tensors, base_config=tied, aligned_config={**tied, "vocab_size": rows})
    assert set(plan.grown.values()) == {rows - 16}
    assert len(plan.grown) == 1 + head


NESTED = [
    {"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": True}},
    {"tie_word_embeddings": None, "llm_config": {"tie_word_embeddings": True}},
    {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}},
    {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}},
]


@pytest.mark.parametrize("config", NESTED)
def test_tie_may_be_said_in_the_language_part_of_a_config(pairs: Pairs, config: dict[str, Any]) -> None:
    plan = pairs.plan(without_head(), tiny_tensors(vocabulary=18), base_config=config, aligned_config=UNTIED)
    assert base_name(plan, HEAD) == EMBED
    assert plan.grown == {EMBED: 2, HEAD: 2}


def test_language_part_that_is_untied_is_untied(pairs: Pairs) -> None:
    config = {"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": False}}
    with pytest.raises(PairError, match="1 tensor is in one checkpoint only"):
        pairs.plan(without_head(), base_config=config, aligned_config=UNTIED)


@pytest.mark.parametrize("said", [True, None])
def test_output_of_an_untied_base_cannot_be_tied(pairs: Pairs, said: bool | None) -> None:
    config = {"tie_word_embeddings": said}
    with pytest.raises(PairError, match=r"lm_head.weight \[16, 8\].*could not be tied.*--unmatched copy"):
        pairs.plan(aligned=without_head(), aligned_config=config)
    plan = pairs.plan(aligned=without_head(), aligned_config=config, unmatched="copy")
    assert plan.ignored_base == (HEAD,)
    assert len(plan.extrapolated) == 7


def test_other_tensors_on_one_side_are_told_before_an_untied_output(pairs: Pairs) -> None:
    with pytest.raises(PairError, match="2 tensors are in one checkpoint only"):
        pairs.plan(aligned=without_head(model__x=torch.zeros(1)), aligned_config=TIED)


def test_stored_output_of_a_tied_base_is_as_good_as_its_embedding(pairs: Pairs) -> None:
    assert base_name(pairs.plan(base_config=TIED), HEAD) == HEAD
    plan = pairs.plan(aligned=without_head(), base_config=TIED, aligned_config=TIED)
    assert (plan.ignored_base, len(plan.extrapolated)) == ((), 7)


def test_small_head_is_not_the_tied_embedding(pairs: Pairs) -> None:
    base, aligned = without_head(), without_head(head__weight=torch.zeros(1, 8))
    with pytest.raises(PairError, match="1 tensor is in one checkpoint only"):
        pairs.plan(base, aligned, base_config=TIED, aligned_config=TIED)


# Prefixes and architectures


@pytest.mark.parametrize("prefix", ["model.", "transformer.", "a_body.", "model.language_model."])
@pytest.mark.parametrize("bare_side", ["base", "aligned"])
def test_prefix_on_one_side_is_seen_in_the_names(pairs: Pairs, prefix: str, bare_side: str) -> None:
    sides = {"base": prefixed(prefix, bare()), "aligned": prefixed(prefix, bare()), bare_side: bare()}
    plan = pairs.plan(sides["base"], sides["aligned"], **{f"{bare_side}_config": ALONE})
    assert (len(plan.extrapolated), plan.warnings) == (7, ())
    for name in plan.tensors:
        assert base_name(plan, name) == (name.removeprefix(prefix) if bare_side == "base" else prefix + name)


def test_bare_body_lacks_its_output_unless_it_is_tied(pairs: Pairs) -> None:
    plan = pairs.plan(bare(), tiny_tensors(vocabulary=18), base_config={**ALONE, **TIED})
    assert base_name(plan, HEAD) == "embed_tokens.weight"
    assert plan.grown == {EMBED: 2, HEAD: 2}
    with pytest.raises(PairError, match=r"1 tensor is in one checkpoint only \(1 in aligned, 0 in base\)"):
        pairs.plan(bare(), base_config=ALONE)
    plan = pairs.plan(bare(), base_config=ALONE, unmatched="copy")
    assert (plan.copied_unmatched, len(plan.extrapolated)) == ((HEAD,), 7)
    with pytest.raises(PairError, match=r"1 tensor is in one checkpoint only \(0 in aligned, 1 in base\)") as caught:
        pairs.plan(aligned=bare(), aligned_config=ALONE)
    assert caught.value.details == ("only in base: lm_head.weight [16, 8]",)
    assert pairs.plan(aligned=bare(), aligned_config=ALONE, unmatched="copy").ignored_base == (HEAD,)


def test_name_that_both_sides_have_stays_beside_a_prefix(pairs: Pairs) -> None:
    head = {HEAD: torch.zeros(16, 8)}
    plan = pairs.plan({**bare(), **head}, {**prefixed("model.", bare()), **head})
    assert (base_name(plan, HEAD), base_name(plan, EMBED)) == (HEAD, "embed_tokens.weight")


def test_few_names_that_fit_make_no_prefix(pairs: Pairs) -> None:
    base, aligned = changed(x__weight=torch.zeros(4)), changed(tower__x__weight=torch.zeros(4), y=torch.zeros(1))
    plan = pairs.plan(base, changed(tower__x__weight=torch.zeros(5)), unmatched="copy")
    assert (plan.copied_unmatched, plan.ignored_base) == (("tower.x.weight",), ("x.weight",))
    with pytest.raises(PairError, match="3 tensors are in one checkpoint only"):
        pairs.plan(base, aligned)


def test_a_prefix_that_two_parts_could_have_is_none(pairs: Pairs) -> None:
    body = {f"layers.{layer}.up.weight": torch.zeros(12, 8) for layer in range(2)}
    aligned = {prefix + name: tensor.clone() for prefix in ("text.", "vision.") for name, tensor in body.items()}
    with pytest.raises(PairError, match=r"share no tensor names \(\d+ in base, \d+ in aligned\)"):
        pairs.plan(body, aligned, unmatched="copy")


def test_nothing_in_common_is_no_pair(pairs: Pairs) -> None:
    with pytest.raises(PairError, match=r"share no tensor names \(\d+ in base, \d+ in aligned\)"):
        pairs.plan({"x.y": torch.zeros(3)}, unmatched="copy")


def test_lone_tensors_of_one_size_are_no_layout(pairs: Pairs) -> None:
    base, aligned = changed(value__weight=torch.zeros(1, 8)), changed(score__weight=torch.zeros(1, 8))
    plan = pairs.plan(base, aligned, unmatched="copy")
    assert (plan.copied_unmatched, plan.ignored_base) == (("score.weight",), ("value.weight",))


def test_a_body_alone_says_whether_its_output_was_tied(pairs: Pairs) -> None:
    whole = {"architectures": ["LlamaForCausalLM"]}
    body: dict[str, Any] = {"architectures": ["LlamaModel"], "tie_word_embeddings": None}
    with pytest.raises(PairError, match="1 tensor is in one checkpoint only"):
        pairs.plan(bare(), base_config=body, aligned_config=whole)
    plan = pairs.plan(bare(), base_config={**body, "tie_word_embeddings": True}, aligned_config=whole)
    assert base_name(plan, HEAD) == "embed_tokens.weight"


def test_no_tensor_takes_the_name_of_another(pairs: Pairs) -> None:
    twice = {**bare(), **prefixed("model.", {"norm.weight": torch.zeros(8)}), "norm.weight": torch.zeros(8)}
    aligned = prefixed("model.", {**bare(), "norm.weight": torch.zeros(8)})
    plan = pairs.plan(twice, aligned, unmatched="copy")
    assert base_name(plan, "model.norm.weight") == "model.norm.weight"
    assert plan.ignored_base == ("norm.weight",)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("LlamaForCausalLM", "LlamaModel"),
        ("LlamaForCausalLM", "LlamaForSequenceClassification"),
        ("GPT2LMHeadModel", "GPT2Model"),
        ("Qwen2VLModel", "Qwen2VLForConditionalGeneration"),
    ],
)
def test_architectures_may_differ_in_the_head(pairs: Pairs, ours: str, theirs: str) -> None:
    for one, other in ((ours, theirs), (theirs, ours)):
        assert pairs.plan(base_config={"architectures": [one]}, aligned_config={"architectures": [other]}).tensors


@pytest.mark.parametrize(
    "aligned",
    [
        {"architectures": ["Llama4ForCausalLM"]},
        {"architectures": ["LlamaForCausalLM", "LlamaModel"]},
        {"architectures": "LlamaModel"},
        {"architectures": [None]},
        {"architectures": ["Model"]},
        {"architectures": ["LlamaModel"], "model_type": "qwen2"},
    ],
)
def test_other_differences_of_architecture_are_refused(pairs: Pairs, aligned: dict[str, Any]) -> None:
    with pytest.raises(PairError, match="different architectures"):
        pairs.plan(aligned_config=aligned)


def test_reward_model_takes_its_head_over(pairs: Pairs) -> None:
    reward = without_head(score__weight=torch.zeros(1, 8))
    config = {"architectures": ["LlamaForSequenceClassification"]}
    with pytest.raises(PairError, match=r"2 tensors are in one checkpoint only \(1 in aligned, 1 in base\)"):
        pairs.plan(aligned=reward, aligned_config=config)
    plan = pairs.plan(aligned=reward, aligned_config=config, unmatched="copy")
    assert (plan.copied_unmatched, plan.ignored_base) == (("score.weight",), (HEAD,))


VALUE_HEAD = ["v_head.summary.bias", "v_head.summary.weight"]


def test_value_head_does_not_matter_where_text_is_generated(pairs: Pairs) -> None:
    value = changed(v_head__summary__weight=torch.zeros(1, 8), v_head__summary__bias=torch.zeros(1))
    for base, unmatched in ((None, "refuse"), (None, "copy"), (value, "refuse")):
        plan = pairs.plan(base, value, unmatched=unmatched)
        assert sorted(plan.left_out) == VALUE_HEAD
        assert (plan.copied, plan.copied_unmatched, len(plan.extrapolated)) == ([], (), 8)
        (warning,) = plan.warnings
        assert warning.startswith(
            "a value head is left out, because a model that generates text cannot load it: v_head."
        )
    plan = pairs.plan(value)
    assert (plan.left_out, plan.ignored_base) == ((), ())


def test_value_head_is_kept_where_the_result_has_to_be_complete(pairs: Pairs) -> None:
    value = changed(v_head__summary__weight=torch.zeros(1, 8), v_head__summary__bias=torch.zeros(1))
    plan = pairs.plan(aligned=value)
    complete = plan_pair(plan.base, pairs.aligned, ExpoConfig(base="b", alpha=0.5), keep_left_out=True)
    assert (complete.left_out, complete.warnings) == ((), ())
    assert {name: tensor for name, tensor in complete.tensors.items() if name in plan.tensors} == plan.tensors
    assert [tensor.name for tensor in complete.copied] == list(complete.tensors)[len(plan.tensors) :]
    assert sorted(complete.tensors.keys() - plan.tensors.keys()) == VALUE_HEAD


def test_value_head_is_refused_or_taken_over_where_values_are_wanted(pairs: Pairs) -> None:
    value = changed(v_head__summary__weight=torch.zeros(1, 8), v_head__summary__bias=torch.zeros(1))
    config = {"architectures": ["LlamaForRewardModel"]}
    with pytest.raises(PairError, match=r"2 tensors are in one checkpoint only \(2 in aligned, 0 in base\)") as caught:
        pairs.plan(aligned=value, base_config=config, aligned_config=config)
    assert "only in aligned: v_head.summary.weight [1, 8]" in caught.value.details
    plan = pairs.plan(aligned=value, base_config=config, aligned_config=config, unmatched="copy")
    assert sorted(plan.copied_unmatched) == VALUE_HEAD


# What only training leaves behind, and what only speculative decoding reads

LEFTOVERS = {
    "rotary frequencies": ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,)),
    "rotary frequencies of all layers": ("rotary_pos_emb.inv_freq", (4,)),
    "value of masked scores": ("transformer.h.0.attn.masked_bias", ()),
    "causal mask": ("transformer.h.0.attn.bias", (1, 1, 4, 4)),
    "causal mask, deeper": ("transformer.h.0.attn.attention.bias", (1, 1, 4, 4)),
    "position ids": ("embeddings.position_ids", (1, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize(("name", "shape"), LEFTOVERS.values(), ids=LEFTOVERS)
def test_leftovers_of_training_are_ignored(pairs: Pairs, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plain, left = tiny_tensors(), {**tiny_tensors(), name: torch.ones(shape, dtype=dtype)}
    other = {**tiny_tensors(), name: torch.ones([2 * size if size > 1 else 1 for size in shape])}
    for base, aligned in ((plain, left), (left, plain), (left, left), (left, other), (other, left)):
        plan = pairs.plan(base, aligned)
        assert (plan.copied_unmatched, plan.ignored_base, plan.warnings) == ((), (), ())
        assert len(plan.extrapolated) == 8


@pytest.mark.parametrize("shape", [(4,), (1, 1, 4, 2), (2, 1, 4, 4)])
def test_bias_of_another_shape_is_no_mask(pairs: Pairs, shape: tuple[int, ...]) -> None:
    with pytest.raises(PairError, match="1 tensor is in one checkpoint only"):
        pairs.plan(aligned=changed(h__0__attn__bias=torch.zeros(shape)))


def mtp_layer(prefix: str) -> Tensors:
    """A multi-token prediction layer with an embedding and an output of its own."""
    names = ("embed_tokens.weight", "shared_head.head.weight", "eh_proj.weight")
    return {prefix + name: torch.zeros(16, 8) for name in names}


MTP: dict[str, tuple[str, dict[str, Any]]] = {
    "numbered on": ("model.layers.2.", {"num_nextn_predict_layers": 1}),
    "numbered on, second": ("model.layers.3.", {"num_nextn_predict_layers": 2}),
    "other key": ("model.layers.2.", {"mtp_num_hidden_layers": 1}),
    "in the language part": (
        "model.layers.2.",
        {"num_hidden_layers": None, "text_config": {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}},
    ),
    "name of its own": ("mtp.layers.0.", {}),
    "inner name": ("model.mtp.layers.0.", {}),
    "longer name": ("model.mtp_block.0.", {}),
}


@pytest.mark.parametrize("unmatched", ["refuse", "copy"])
@pytest.mark.parametrize(("prefix", "config"), MTP.values(), ids=MTP)
def test_mtp_layers_of_one_side_do_not_matter(
    pairs: Pairs, prefix: str, config: dict[str, Any], unmatched: str
) -> None:
    with_mtp = {**without_head(), **mtp_layer(prefix)}
    plan = pairs.plan(
        without_head(), with_mtp, base_config=TIED, aligned_config={**config, **TIED}, unmatched=unmatched
    )
    assert [tensor.name for tensor in plan.copied] == sorted(mtp_layer(prefix))
    taken_over = sorted(mtp_layer(prefix)) if unmatched == "copy" else []
    assert (sorted(plan.copied_unmatched), len(plan.extrapolated)) == (taken_over, 7)
    assert plan.warnings[0].startswith("only aligned has multi-token prediction layers (3 tensors)")
    assert len(plan.warnings) == 1 + (unmatched == "copy")
    plan = pairs.plan(with_mtp, base_config={**config, **TIED}, unmatched=unmatched)
    assert (plan.ignored_base, plan.warnings) == ((), ())
    assert base_name(plan, HEAD) == EMBED
    both = {**config, **TIED}
    assert len(pairs.plan(with_mtp, with_mtp, base_config=both, aligned_config=both).extrapolated) == 10


@pytest.mark.parametrize(
    ("prefix", "config"),
    [
        ("model.layers.2.", {}),
        ("model.layers.2.", {"num_nextn_predict_layers": 0}),
        ("model.layers.2.", {"num_nextn_predict_layers": "1"}),
        ("model.layers.3.", {"num_nextn_predict_layers": 1}),
        ("model.layers.2.", {"num_nextn_predict_layers": 1, "num_hidden_layers": None}),
        ("model.layers.1.", {"num_nextn_predict_layers": 1}),
        ("model.prompt.0.", {}),
    ],
)
def test_other_layers_of_one_side_do_matter(pairs: Pairs, prefix: str, config: dict[str, Any]) -> None:
    with pytest.raises(PairError, match="3 tensors are in one checkpoint only"):
        pairs.plan(aligned={**changed(), **mtp_layer(prefix)}, aligned_config=config)


def test_a_towers_layers_are_no_mtp_layers(pairs: Pairs) -> None:
    tower = {f"vision.encoder.layers.{layer}.w.weight": torch.zeros(4, 4) for layer in range(3)}
    config = {"num_nextn_predict_layers": 1}
    with pytest.raises(PairError, match="3 tensors are in one checkpoint only"):
        pairs.plan(aligned={**changed(), **tower}, base_config=config, aligned_config=config)
