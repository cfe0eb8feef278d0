"""What PEFT merges is what we compute: its own merge of tiny models in fp32, rounded once, is the reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from expo_serve.load.counts import Counts
from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.reader import Reader
from expo_serve.load.session import LoadSession
from expo_serve.plan.plan import Plan
from tests.models.adapters import plan_delta, units_apart
from tests.models.raw import same_bits

ROWS, MORE_ROWS = 96, 104
SPREAD = 0.01
"""Of both factors: at rank 4 most values move by some units of bf16, many not at all."""
SAME_SHARE = 0.999
Tensors = dict[str, torch.Tensor]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _llama(tied: bool) -> Callable[[], transformers.PretrainedConfig]:
    return lambda: transformers.LlamaConfig(
        vocab_size=ROWS,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )


def _gpt2() -> transformers.PretrainedConfig:
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2Config(vocab_size=ROWS, n_embd=64, n_layer=2, n_head=4, n_positions=32, **ids)


UNTIED, TIED = _llama(False), _llama(True)


@dataclass(frozen=True)
class Case:
    """A model, and how it is adapted."""

    model: Callable[[], transformers.PretrainedConfig]
    lora: dict[str, Any]
    rows: int = ROWS
    """Of the vocabulary when it is trained."""
    saves_embedding: bool = False
    """Whether the adapter holds the embedding that it adapts too, as PEFT has it by default."""


def _case(
    model: Callable[[], transformers.PretrainedConfig],
    *targets: str,
    rows: int = ROWS,
    saves_embedding: bool = False,
    **lora: Any,
) -> Case:
    return Case(model, {"r": 4, "lora_alpha": 8, "target_modules": list(targets), **lora}, rows, saves_embedding)


BOTH = ["embed_tokens", "lm_head"]
CASES = {
    "plain": _case(UNTIED, "q_proj", "v_proj", "down_proj"),
    "every linear module": _case(UNTIED, *("q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "lm_head")),
    "patterns": _case(
        UNTIED,
        *("q_proj", "o_proj", "up_proj"),
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        alpha_pattern={r".*\.o_proj": 3, "^model.layers.0.mlp.up_proj": 20},
    ),
    "rsLoRA": _case(UNTIED, "q_proj", "up_proj", use_rslora=True, rank_pattern={"up_proj": 3}),
    "embedding": _case(UNTIED, "q_proj", "embed_tokens"),
    "embedding, as saved by default": _case(UNTIED, "q_proj", "embed_tokens", saves_embedding=True),
    "output trained whole": _case(UNTIED, "q_proj", modules_to_save=["lm_head"]),
    "both ends trained whole": _case(UNTIED, "q_proj", modules_to_save=BOTH),
    "more rows": _case(UNTIED, "q_proj", modules_to_save=BOTH, rows=MORE_ROWS),
    "tied": _case(TIED, "q_proj", "down_proj"),
    "tied: embedding": _case(TIED, "embed_tokens"),
    "tied: output": _case(TIED, "q_proj", "lm_head"),
    "tied: both": _case(TIED, *BOTH),
    "tied: embedding, as saved by default": _case(TIED, "embed_tokens", saves_embedding=True),
    "tied: output, as saved by default": _case(TIED, "q_proj", "lm_head", saves_embedding=True),
    "tied: both, as saved by default": _case(TIED, *BOTH, saves_embedding=True),
    "tied: embedding trained whole": _case(TIED, "q_proj", modules_to_save=["embed_tokens"]),
    "tied: output trained whole": _case(TIED, "q_proj", modules_to_save=["lm_head"]),
    "tied: both trained whole": _case(TIED, "q_proj", modules_to_save=BOTH),
    "tied: both trained whole, kept tied": _case(
        TIED, "q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "tied: embedding, kept tied": _case(TIED, "q_proj", "embed_tokens", ensure_weight_tying=True),
    "tied: more rows": _case(TIED, "q_proj", modules_to_save=BOTH, rows=MORE_ROWS),
    "inputs first": _case(_gpt2, "c_attn", "c_proj", "c_fc", fan_in_fan_out=True),
    "inputs first, square ones only": _case(_gpt2, r"attn.c_proj", fan_in_fan_out=True),
    # PEFT writes down the flag of the module that it came to last, which is the output here.
    "inputs first, the output not": _case(_gpt2, "c_attn", "c_proj", "lm_head", fan_in_fan_out=True),
}


@dataclass(frozen=True)
class Trained:
    """An adapter in files, and what PEFT makes of it."""

    base: Path
    adapter: Path
    before: Tensors
    """Base, in fp32."""
    after: Tensors
    """Merged, in fp32."""

    def plan(self, alpha: float) -> Plan:
        """The plan of a load."""
        return plan_delta(self.base, self.adapter, alpha)

    def extrapolated(self, name: str, alpha: float) -> torch.Tensor:
        """By PEFT's merge and our formula, in fp32, rounded once; rows that only the adapter has are its own."""
        before, after = self.before[name], self.after[name].clone()
        shared = after[: len(before)]
        shared.copy_(before + (1 + alpha) * (shared - before))
        return after.bfloat16()


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Each case, built once."""
    return build(CASES[request.param], tmp_path_factory.mktemp("trained"))


def build(case: Case, folder: Path) -> Trained:
    """Save a random model in bf16, adapt it in fp32, and merge."""
    torch.manual_seed(3)
    base, adapter = folder / "base", folder / "adapter"
    transformers.AutoModelForCausalLM.from_config(case.model()).to(torch.bfloat16).save_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = _copies(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied embeddings and turned flags, which are what is tested
        if case.rows != ROWS:
            model.resize_token_embeddings(case.rows)
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **case.lora))
        _train(adapted)
        adapted.save_pretrained(adapter, save_embedding_layers=case.saves_embedding)
        return Trained(base, adapter, before, _copies(adapted.merge_and_unload()))


def _copies(model: Any) -> Tensors:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _train(model: Any) -> None:
    """Random steps in place of training: PEFT begins with factors whose product is zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(SPREAD * torch.randn_like(parameter))
            elif "modules_to_save" in name:
                parameter.add_(SPREAD * 0.02 * torch.randn_like(parameter))


def materialized(plan: Plan) -> Tensors:
    """Every tensor of the result."""
    reader = Reader()
    return {
        name: lazy_tensor(tensor, LoadSession(reader, Counts())).materialize() for name, tensor in plan.tensors.items()
    }


def as_loaded(found: Tensors, plan: Plan) -> Tensors:
    """With the output that a model takes from its embedding, where its config says so."""
    embedding = next(name for name in found if name.endswith(("embed_tokens.weight", "wte.weight")))
    is_tied = plan.overrides.get("tie_word_embeddings", plan.base.config["tie_word_embeddings"])
    return {**found, HEAD: found[embedding]} if is_tied else found


@pytest.mark.parametrize("alpha", [0, 0.5])
def test_numbers_are_those_of_peft(trained: Trained, alpha: float) -> None:
    plan = trained.plan(alpha)
    found = as_loaded(materialized(plan), plan)
    assert found.keys() == trained.after.keys()
    apart = {name: units_apart(found[name], trained.extrapolated(name, alpha)) for name in found}
    assert {name: int(units.max()) for name, units in apart.items() if units.max() > 1} == {}
    every = torch.cat([units.flatten() for units in apart.values()])
    assert (every == 0).double().mean() >= SAME_SHARE


def test_what_the_adapter_does_not_name_is_base(trained: Trained) -> None:
    """And the test above compares something: what it does name has moved."""
    plan = trained.plan(0)
    same = {name for name in trained.before if torch.equal(trained.before[name], trained.after[name])}
    assert same.issuperset(plan.unchanged)
    assert any(name not in same for name in plan.tensors)


def test_at_minus_one_all_but_new_rows_is_base(trained: Trained) -> None:
    for name, tensor in materialized(trained.plan(-1)).items():
        before = trained.before[name].bfloat16()
        assert torch.equal(tensor[: len(before)], before)


@pytest.mark.parametrize(("case", "prefix"), [("plain", "model."), ("inputs first", "transformer.")])
def test_base_whose_names_lack_a_prefix_is_found(tmp_path: Path, case: str, prefix: str) -> None:
    """As the hub's gpt2 is stored; most adapters name a few of its tensors only."""
    trained = build(CASES[case], tmp_path)
    expected = {name.removeprefix(prefix): tensor for name, tensor in materialized(trained.plan(0.5)).items()}
    file = trained.base / "model.safetensors"
    bare = {name.removeprefix(prefix): tensor for name, tensor in load_file(file).items()}
    save_file(bare, file)
    found = materialized(trained.plan(0.5))
    assert found.keys() == expected.keys()
    assert [name for name in found if not same_bits(found[name], expected[name])] == []


@pytest.mark.parametrize(
    ("case", "overrides"),
    [
        ("plain", {}),
        ("both ends trained whole", {}),
        ("more rows", {"vocab_size": MORE_ROWS}),
        ("tied: output", {}),
        ("tied: output trained whole", {"tie_word_embeddings": False}),
        ("tied: more rows", {"vocab_size": MORE_ROWS, "tie_word_embeddings": False}),
    ],
)
def test_config_follows_the_tensors(tmp_path: Path, case: str, overrides: dict[str, Any]) -> None:
    assert build(CASES[case], tmp_path).plan(0).overrides == overrides
