"""Names in memory against names in checkpoints: real tiny models, saved by transformers and adapted by PEFT."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from expo_serve.config import ExpoConfig
from expo_serve.errors import PairError
from expo_serve.load.counts import Counts
from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.reader import Reader
from expo_serve.load.session import LoadSession
from expo_serve.plan import conversion_table
from expo_serve.plan.conversion import bare_name, find_candidates, only_pairs
from expo_serve.plan.conversion_table import Conversion, read_conversion, read_table
from expo_serve.plan.plan import Plan
from expo_serve.plan.prepare import prepare
from tests.models.adapters import FILE, PREFIX, factors, plan_delta, units_apart, write_adapter
from tests.models.raw import same_bits, write_raw
from tests.models.reference import extrapolate, read_tensors

SIZE = 64
SAME_SHARE = 0.999
# The towers are as wide as the language models, so that no shape tells their projections apart.
_TEXT = {"hidden_size": SIZE, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {**_TEXT, "num_key_value_heads": 2, "vocab_size": 128}
_HEADED = {**_TEXT, "head_dim": 32}
_TOWER = {"hidden_size": SIZE, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
_TOWER = {**_TOWER, "image_size": 28, "patch_size": 14}
_ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """A model, what is adapted in it, and what stands in another place in memory than in its checkpoint."""

    make: Callable[[], Any]
    text: str | None
    """The class of its language model alone."""
    lora: dict[str, Any] = field(default_factory=lambda: {"target_modules": ["q_proj", "v_proj", "down_proj"]})


def _gemma3() -> Any:
    parts = {"text_config": _HEADED, "vision_config": _TOWER}
    return transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**parts, mm_tokens_per_image=4))


def _llava() -> Any:
    tower = {**_TOWER, "model_type": "clip_vision_model", "projection_dim": 32}
    config = transformers.LlavaConfig(text_config={**_TEXT, "model_type": "llama"}, vision_config=tower)
    return transformers.LlavaForConditionalGeneration(config)


def _qwen() -> Any:
    tower = {"hidden_size": SIZE, "intermediate_size": 96, "depth": 2, "num_heads": 2, "out_hidden_size": SIZE}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": _ROPE}, vision_config={**tower, "fullatt_block_indexes": [1]}
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _mistral3() -> Any:
    config = transformers.Mistral3Config(
        text_config={**_HEADED, "model_type": "mistral"},
        vision_config={**_TOWER, "model_type": "pixtral", "head_dim": 32},
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def _gpt_neox() -> Any:
    sizes = {key: value for key, value in _TEXT.items() if key != "num_key_value_heads"}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, tie_word_embeddings=False))


FAMILIES = {
    "gemma3": Family(_gemma3, "Gemma3ForCausalLM"),
    "llava": Family(_llava, "LlamaForCausalLM"),
    "llava, parts trained whole": Family(
        _llava, None, {"target_modules": ["q_proj"], "modules_to_save": ["linear_1", "lm_head"]}
    ),
    "llava, output adapted": Family(_llava, None, {"target_modules": ["o_proj", "lm_head"]}),
    "qwen2.5-vl": Family(_qwen, "Qwen2ForCausalLM", {"target_modules": ["q_proj", "up_proj", "qkv"]}),
    "mistral3": Family(_mistral3, "MistralForCausalLM"),
    # Only transformers' own table knows that its output has another name in memory.
    "gpt-neox": Family(_gpt_neox, None, {"target_modules": ["query_key_value", "lm_head"]}),
}
TEXTS = [name for name, family in FAMILIES.items() if family.text]


@dataclass(frozen=True)
class Trained:
    """A model in files under both kinds of names, its adapter, and PEFT's own merge of them."""

    folder: Path
    saved: Path
    """The checkpoint that save_pretrained writes, in bf16."""
    in_memory: Path
    """The same tensors under the names that they have in memory."""
    adapter: Path
    """As PEFT saves it: under names in memory."""
    merged: Tensors
    """In fp32, by the names of ``saved``."""
    names: dict[str, str]
    """Names in memory to names in ``saved``."""


def build(family: Family, folder: Path) -> Trained:
    """Save a random model, adapt it in fp32 and merge."""
    torch.manual_seed(5)
    model = _spread(family.make().to(torch.bfloat16))
    saved, in_memory, adapter = folder / "saved", folder / "memory", folder / "adapter"
    model.save_pretrained(saved)
    state = _stored(model)
    names = _same_tensors(state, read_tensors(saved))
    _write_like(saved, in_memory, state)
    model = model.float()
    adapted = _adapt(model, family.lora)
    adapted.save_pretrained(adapter, save_embedding_layers=False)
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    return Trained(folder, saved, in_memory, adapter, read_tensors(folder / "merged"), names)


def _spread(model: Any) -> Any:
    """Random values in every tensor, so that each is known by its values."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _stored(model: Any) -> Tensors:
    """The tensors that a checkpoint has, under names in memory: without a tied output."""
    embedding = model.get_input_embeddings().weight.data_ptr()
    tensors = model.state_dict().items()
    return {
        name: tensor.clone()
        for name, tensor in tensors
        if not (name.startswith("lm_head") and tensor.data_ptr() == embedding)
    }


def _same_tensors(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The names that equal tensors have in both."""
    pairs = {
        name: [key for key, candidate in other.items() if same_bits(tensor, candidate)] for name, tensor in one.items()
    }
    assert {len(found) for found in pairs.values()} == {1}
    assert len(one) == len(other)
    return {name: found[0] for name, found in pairs.items()}


def _write_like(checkpoint: Path, folder: Path, tensors: Tensors) -> None:
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def _adapt(model: Any, lora: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied embeddings
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **lora))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.02 * torch.randn_like(parameter))
            elif "modules_to_save" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return adapted


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Each family, built once."""
    return build(FAMILIES[request.param], tmp_path_factory.mktemp("trained"))


def materialized(plan: Plan) -> Tensors:
    """Every tensor of the result."""
    reader = Reader()
    return {
        name: lazy_tensor(tensor, LoadSession(reader, Counts())).materialize() for name, tensor in plan.tensors.items()
    }


def assert_merged(found: Tensors, base: Tensors, merged: Tensors) -> None:
    """PEFT's values rounded once where PEFT changes a tensor, base's bits where it does not."""
    assert found.keys() == base.keys() == merged.keys()
    untouched = {name for name in base if torch.equal(base[name].float(), merged[name])}
    assert 0 < len(untouched) < len(base)
    assert [name for name in untouched if not same_bits(found[name], base[name])] == []
    apart = {name: units_apart(found[name], merged[name].bfloat16()) for name in base}
    assert {name: int(units.max()) for name, units in apart.items() if units.max() > 1} == {}
    every = torch.cat([units.flatten() for name, units in apart.items() if name not in untouched])
    assert (every == 0).double().mean() >= SAME_SHARE


def test_the_names_differ(trained: Trained) -> None:
    """Else nothing is tested below; also that the adapter's tensors have the names in memory."""
    assert any(name != other for name, other in trained.names.items())
    modules = {name.removeprefix(PREFIX).split(".lora_")[0] for name in load_file(trained.adapter / FILE)}
    assert {f"{module}.weight" for module in modules if not module.endswith((".weight", ".bias"))} <= set(trained.names)


def test_adapter_with_names_in_memory_fits_the_saved_checkpoint(trained: Trained) -> None:
    found = materialized(plan_delta(trained.saved, trained.adapter, 0))
    assert_merged(found, read_tensors(trained.saved), trained.merged)


def test_adapter_with_names_in_memory_fits_such_a_checkpoint(trained: Trained) -> None:
    found = materialized(plan_delta(trained.in_memory, trained.adapter, 0))
    merged = {name: trained.merged[other] for name, other in trained.names.items()}
    assert_merged(found, read_tensors(trained.in_memory), merged)


def test_adapter_with_saved_names_fits_a_checkpoint_with_names_in_memory(trained: Trained, tmp_path: Path) -> None:
    adapter = _renamed_adapter(trained, tmp_path / "adapter")
    found = materialized(plan_delta(trained.in_memory, adapter, 0))
    merged = {name: trained.merged[other] for name, other in trained.names.items()}
    assert_merged(found, read_tensors(trained.in_memory), merged)


def _renamed_adapter(trained: Trained, folder: Path) -> Path:
    """The adapter as it would be saved by a version that has the checkpoint's names in memory."""
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((trained.adapter / "adapter_config.json").read_bytes())
    tensors = {}
    for name, tensor in load_file(trained.adapter / FILE).items():
        plain = name.removeprefix(PREFIX)
        module, dot, factor = plain.partition(".lora_")
        saved = trained.names[f"{module}.weight"].removesuffix(".weight") if dot else trained.names[plain]
        tensors[f"{PREFIX}{saved}{dot}{factor}"] = tensor
    save_file(tensors, folder / FILE)
    return folder


@pytest.mark.parametrize("alpha", [-0.5, 0.5])
def test_extrapolates_from_base_to_the_merge(trained: Trained, alpha: float) -> None:
    found = materialized(plan_delta(trained.saved, trained.adapter, alpha))
    for name, base in read_tensors(trained.saved).items():
        expected = (base.double() + (1 + alpha) * (trained.merged[name].double() - base.double())).bfloat16()
        units = units_apart(found[name], expected)
        assert units.max() <= 1
        assert (units == 0).double().mean() >= 0.99


@pytest.mark.parametrize("base_is", ["saved", "in memory"])
@pytest.mark.parametrize("name", TEXTS)
def test_adapter_of_the_language_model_alone(name: str, base_is: str, tmp_path: Path) -> None:
    """It lands in the language model, though the tower's projections have the same shapes and layer numbers."""
    torch.manual_seed(6)
    whole = _spread(FAMILIES[name].make().to(torch.bfloat16))
    whole.save_pretrained(tmp_path / "saved")
    state = _stored(whole)
    if base_is == "in memory":
        _write_like(tmp_path / "saved", tmp_path / "memory", state)
    base = tmp_path / ("saved" if base_is == "saved" else "memory")
    merged, changed = _merged_text(name, whole, tmp_path / "adapter")
    before, found = read_tensors(base), materialized(plan_delta(base, tmp_path / "adapter", 0))
    where = _same_tensors(state, before)
    expected = {where[key]: merged.get(key, tensor.float()) for key, tensor in state.items()}
    assert_merged(found, before, expected)
    moved = {key for key in before if not same_bits(found[key], before[key])}
    assert moved == {where[key] for key in changed}


def _merged_text(name: str, whole: Any, adapter: Path) -> tuple[Tensors, set[str]]:
    """Adapt and merge the language model alone: its tensors by their names in the whole model, and which changed."""
    text = FAMILIES[name].text
    assert text
    kind = getattr(transformers, text)
    config = kind.config_class(**{**_HEADED, "tie_word_embeddings": False})
    model = kind(config).float()
    state = {
        key: tensor.float()
        for key, tensor in whole.state_dict().items()
        if key.startswith(("model.language_model", "lm_head"))
    }
    plain = {key.replace("model.language_model.", "model."): tensor for key, tensor in state.items()}
    model.load_state_dict(plain)
    adapted = _adapt(model, {"target_modules": ["q_proj", "v_proj", "down_proj"]})
    adapted.save_pretrained(adapter)
    after = adapted.merge_and_unload().state_dict()
    merged = {key.replace("model.", "model.language_model.", 1): tensor for key, tensor in after.items()}
    return merged, {key for key, tensor in merged.items() if not torch.equal(tensor, state[key])}


@pytest.mark.parametrize("aligned_is", ["in memory", "saved"])
def test_pair_under_both_kinds_of_names(trained: Trained, aligned_is: str, tmp_path: Path) -> None:
    """Every tensor of aligned has its own in base, and the result has aligned's names."""
    names = trained.names if aligned_is == "in memory" else {other: name for name, other in trained.names.items()}
    base, like = trained.saved, trained.in_memory
    base, like = (base, like) if aligned_is == "in memory" else (like, base)
    before = read_tensors(base)
    after = {name: before[other] + 0.02 * torch.randn_like(before[other]) for name, other in names.items()}
    _write_like(like, tmp_path / "aligned", after)
    plan = prepare(ExpoConfig(base=str(base), aligned=str(tmp_path / "aligned"), alpha=0.5, rounding="nearest"))
    assert {name: tensor.base.name for name, tensor in plan.tensors.items() if tensor.base} == names
    found = materialized(plan)
    expected = {name: extrapolate(before[names[name]], tensor, 0.5) for name, tensor in after.items()}
    assert [name for name in after if not same_bits(found[name], expected[name])] == []


# What is not paired

Q = "layers.0.self_attn.q_proj"


def line_of(tmp_path: Path, base: Mapping[str, tuple[int, ...]], *modules: str, **config: Any) -> str:
    """The refusal of an adapter of these modules, of 8 times 8 values each."""
    tensors = {name: torch.ones(shape) for name, shape in base.items()}
    adapter: Tensors = {}
    for module in modules:
        adapter |= factors(module, 8, 8)
    with pytest.raises(PairError) as error:
        plan_delta(write_raw(tmp_path / "base", tensors, **config), write_adapter(tmp_path / "adapter", adapter), 0)
    return str(error.value).splitlines()[0]


def test_name_that_fits_two_language_models_is_refused(tmp_path: Path) -> None:
    base = {f"{part}.{Q}.weight": (8, 8) for part in ("model", "language_model")}
    line = line_of(tmp_path, base, f"model.text_model.{Q}")
    assert f"several tensors of base could be meant by model.text_model.{Q}.weight" in line
    assert all(name in line for name in base)
    assert "trained on" not in line


def test_name_without_a_wrapper_may_be_a_towers(tmp_path: Path) -> None:
    base = {f"{part}.{Q}.weight": (8, 8) for part in ("model.language_model", "model.audio_tower")}
    assert "several tensors of base could be meant by" in line_of(tmp_path, base, Q)


def test_wrappers_and_a_prefix_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    """The prefix pairs most of the names, but leaves one out that only other wrappers pair."""
    base = {f"outer.llm.{Q.replace('0', number)}.weight": (8, 8) for number in "0123"}
    base |= {f"model.{Q}.weight": (8, 8), "model.layers.4.self_attn.q_proj.weight": (8, 8)}
    line = line_of(tmp_path, base, *(f"llm.{Q.replace('0', number)}" for number in "01234"))
    assert f"could be meant by llm.{Q}.weight (model.{Q}.weight and outer.llm.{Q}.weight)" in line


def test_two_names_for_one_tensor_are_refused(tmp_path: Path) -> None:
    line = line_of(tmp_path, {f"language_model.{Q}.weight": (8, 8)}, f"model.llm.{Q}", f"llm.model.{Q}")
    assert "another name in the adapter means too" in line


def test_name_beside_one_with_a_prefix_more_is_refused(tmp_path: Path) -> None:
    """Both mean one tensor, to which both products would be added."""
    others = [Q.replace("0", number) for number in "123"]
    base = {f"model.{name}.weight": (8, 8) for name in (Q, *others)}
    line = line_of(tmp_path, base, f"model.{Q}", Q, *others)
    assert f"{Q}.weight would be model.{Q}.weight in base, which another name in the adapter means too" in line


def test_shape_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    line = line_of(tmp_path, {f"language_model.model.{Q}.weight": (8, 12)}, f"model.language_model.{Q}")
    assert "shape or kind differs in 1 of 1 module" in line


@pytest.mark.parametrize(
    ("module", "stored"),
    [
        ("self_attn.q_proj", "self_attn.qkv_proj.weight"),
        ("mlp.experts.3.up_proj", "mlp.experts.gate_up_proj"),
    ],
)
def test_other_layout_is_named(tmp_path: Path, module: str, stored: str) -> None:
    base = {f"language_model.model.layers.0.{stored}": (24, 8)}
    line = line_of(tmp_path, base, f"model.language_model.layers.0.{module}")
    assert f"base has {stored.split('.')[-1 if 'experts' in stored else 1]} in layers.0." in line
    assert "another layout (fused, split or stacked), merge it with PEFT" in line


def test_same_tensor_under_a_name_that_no_rule_knows_is_named(tmp_path: Path) -> None:
    line = line_of(tmp_path, {f"thinker.body.{Q}.weight": (8, 8)}, f"model.talker.{Q}")
    assert f"if it is the same tensor as thinker.body.{Q}.weight in base, merge it with PEFT" in line


def test_another_model_is_told_as_before(tmp_path: Path) -> None:
    line = line_of(tmp_path, {f"model.{Q}.weight": (8, 8)}, "transformer.h.0.attn.c_attn")
    assert line.endswith("the first transformer.h.0.attn.c_attn.weight; give the base that the adapter was trained on")


def test_values_that_a_conversion_turns_are_not_paired(tmp_path: Path) -> None:
    """Stacked experts that are turned on loading have one name and one shape before and after."""
    name = "layers.0.mlp.experts.down_proj"
    base = [f"model.language_model.{name}", "model.language_model.norm.weight"]
    names = [f"language_model.model.{name}", "language_model.model.norm.weight"]
    assert only_pairs(find_candidates(names, base, {}, {})) == dict(zip(names, base, strict=True))
    assert only_pairs(find_candidates(names, base, {"model_type": "qwen3_vl_moe"}, {})) == {names[1]: base[1]}


def test_only_wrappers_are_left_out() -> None:
    assert bare_name("model.language_model.layers.0.mlp.weight") == "layers.0.mlp.weight"
    assert bare_name("language_model.lm_head.weight") == "lm_head.weight"
    assert bare_name("model.vision_tower.vision_model.encoder.weight") == "vision_tower.encoder.weight"
    for name in ("vision_model.encoder.weight", "decoder.model.layers.0.weight", "model", "mtp.layers.0.weight"):
        assert bare_name(name) == name


# The table

_NOT_READ = {"kimi_k25", "Tipsv2DptForNormalEstimation", "Tipsv2DptForSemanticSegmentation"}
"""Renamings in groups and lists that are computed."""


def test_table_is_that_of_transformers() -> None:
    theirs = conversion_mapping._build_checkpoint_conversion_mapping()
    assert theirs.keys() - read_table().keys() == _NOT_READ
    for key, entries in read_table().items():
        kinds = [type(transform).__name__ for transform in theirs[key]]
        assert [entry.kind for entry in entries] == kinds, key
        plain = [transform for transform in theirs[key] if type(transform) is WeightRenaming]
        ours = list(conversion_table._renamings(entries))
        assert [f"(?P<g0>{renaming.pattern.pattern})" for renaming in ours] == [
            transform.compiled_sources.pattern for transform in plain
        ], key
        assert [renaming.replacement for renaming in ours] == [transform.target_patterns[0] for transform in plain], key
        converters = sum(isinstance(transform, WeightConverter) for transform in theirs[key])
        assert len(list(conversion_table._value_changes(entries))) == converters


def test_every_model_of_the_table_can_be_looked_up() -> None:
    for key in read_table():
        assert isinstance(read_conversion({"model_type": key, "text_config": {"model_type": key}}), Conversion)


def test_class_comes_before_type() -> None:
    conversion = read_conversion({"architectures": ["GPTNeoXForCausalLM"], "model_type": "llava"})
    assert conversion.rename("embed_out.weight") == "lm_head.weight"
    assert conversion.rename("vision_tower.a") == "vision_tower.a"


def test_without_a_table_wrappers_are_still_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion_table, "read_table", dict)
    name, base = f"model.language_model.{Q}.weight", f"language_model.model.{Q}.weight"
    assert only_pairs(find_candidates([name], [base], {"model_type": "llava"}, {})) == {name: base}


@pytest.mark.parametrize(
    "text",
    [
        "def _build_checkpoint_conversion_mapping():\n    mapping = {'a': [Unknown('x', 'y')]}",
        "def _build_checkpoint_conversion_mapping():\n    mapping = {'a': [WeightRenaming(x, 'y')]}",
        "def _build_checkpoint_conversion_mapping():\n    mapping = {'a': [WeightRenaming('x')]}",
        "def _build_checkpoint_conversion_mapping():\n    mapping = {'a': [WeightRenaming('x', 3)]}",
        "def _build_checkpoint_conversion_mapping():\n    mapping = {'a': other['b']}",
        "def _build_checkpoint_conversion_mapping():\n    mapping = {'a': []}\n    mapping['a'] += made()",
        "def another():\n    mapping = {'a': [WeightRenaming('x', 'y')]}",
        "",
    ],
)
def test_list_that_cannot_be_read_is_left_out(text: str) -> None:
    assert conversion_table.table_in(ast.parse(text)) == {}


def test_reading_the_table_imports_neither_torch_nor_transformers() -> None:
    code = "import sys\nfrom expo_serve.plan.conversion_table import read_table\nassert read_table()\n"
    code += "print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not set(result.stdout.split()) & {"torch", "transformers", "vllm"}
