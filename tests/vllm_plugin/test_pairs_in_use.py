"""Pairs as people have them, bit for bit: expo against plain vLLM on the reference's checkpoint.

``tests/plan/test_pair_in_use.py`` has what is refused and what is warned of; here is what loads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from expo_serve.report import LoadReport
from tests import compare
from tests.compare import by_expo, differing, load
from tests.models import build_pair, read_tensors, reference_checkpoint
from tests.models.extras import make_reward_model
from tests.models.raw import write_index
from tests.models.reference import same_name

pytestmark = pytest.mark.engine
ALPHA = 0.5
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
POOLING = {"runner": "pooling"}
Step = Callable[[Path], None]
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=8, vocab_size=256, n_positions=128),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**SIZES, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
        topk_method="noaux_tc",
        num_nextn_predict_layers=1,
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **{**SIZES, "num_experts": 4, "shared_expert_intermediate_size": 32, "head_dim": 32},
        **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 8),
        **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 32),
        layer_types=["linear_attention", "full_attention"],
    ),
}


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    """Write all tensors of a one-file checkpoint anew, and keys of its config."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


def add(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    """Add tensors, and keys to the config."""
    write(folder, {**read_tensors(folder), **tensors}, **config)


def drop_tied_output(folder: Path) -> None:
    """Store the output of a tied model only once, as the embedding."""
    if json.loads((folder / "config.json").read_text())["tie_word_embeddings"]:
        write(folder, {name: tensor for name, tensor in read_tensors(folder).items() if name != HEAD})


def add_tokens(folder: Path, tokens: int, multiple: int | None = None) -> None:
    """Give the vocabulary this many rows, as a trainer does that adds tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.resize_token_embeddings(tokens, pad_to_multiple_of=multiple, mean_resizing=False)
    model.save_pretrained(folder)


def keep_body(folder: Path) -> None:
    """Save the model without its head."""
    transformers.AutoModel.from_pretrained(folder, dtype="auto").save_pretrained(folder)


def add_value_head(folder: Path) -> None:
    """What a trainer of policy and value together saves."""
    add(folder, {"v_head.summary.weight": torch.randn(1, 64), "v_head.summary.bias": torch.randn(1)})


def untie(folder: Path) -> None:
    """Give a tied model an output of its own."""
    add(folder, {HEAD: read_tensors(folder)[EMBED] * 1.25}, tie_word_embeddings=False)


def store_tied_output(folder: Path) -> None:
    """Store the output of a tied model too, as some tools do."""
    add(folder, {HEAD: read_tensors(folder)[EMBED].clone()})


def untie_and_add_tokens(folder: Path) -> None:
    """Both, and pad."""
    untie(folder)
    add_tokens(folder, 300, 64)


def shard(folder: Path, files: int) -> None:
    """Spread the tensors over several files, their order turned around."""
    tensors = read_tensors(folder)
    weight_map = {}
    for number in range(files):
        name = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = list(reversed(tensors))[number::files]
        save_file({key: tensors[key] for key in part}, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors").unlink()
    write_index(folder, weight_map)


def leave_masks(folder: Path) -> None:
    """The buffers that early versions of transformers saved."""
    mask = torch.ones(128, 128).tril().view(1, 1, 128, 128)
    prefix = "transformer.h.0.attn"
    add(folder, {f"{prefix}.bias": mask, f"{prefix}.masked_bias": torch.tensor(-1e4)})


def leave_frequencies(folder: Path) -> None:
    """The buffer that later versions saved."""
    add(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})


def add_numbered_mtp(folder: Path) -> None:
    """A multi-token prediction layer that is numbered on from the last one."""
    prefix = "model.layers.2."
    inner = {
        name.replace("model.layers.1.", prefix): tensor.clone()
        for name, tensor in read_tensors(folder).items()
        if name.startswith("model.layers.1.")
    }
    shapes = {"enorm": (64,), "hnorm": (64,), "shared_head.norm": (64,), "eh_proj": (64, 128)}
    shapes |= {"embed_tokens": (256, 64), "shared_head.head": (256, 64)}
    add(folder, inner | {f"{prefix}{name}.weight": torch.randn(shape).bfloat16() for name, shape in shapes.items()})


def add_named_mtp(folder: Path) -> None:
    """One under a name of its own."""
    add(folder, {"mtp.fc.weight": torch.randn(64, 128), "mtp.layers.0.input_layernorm.weight": torch.randn(64)})


def nothing(folder: Path) -> None:
    """Leave it as it is."""


def with_model(name: str) -> str:
    return f"model.{name}"


def without_model(name: str) -> str:
    return name.removeprefix("model.")


def tied(name: str) -> str:
    return EMBED if name == HEAD else name


def tied_without_model(name: str) -> str:
    return without_model(tied(name))


@dataclass(frozen=True)
class Case:
    """A family, what happened to each side, how aligned's names lead to base's, and what the report counts:
    rows grown, tensors only in aligned and only in base."""

    family: str = "llama"
    base: Step = nothing
    aligned: Step = nothing
    base_name: Callable[[str], str] = same_name
    unmatched: str = "refuse"
    base_dtype: torch.dtype = torch.bfloat16
    aligned_dtype: torch.dtype = torch.bfloat16
    arguments: dict[str, Any] = field(default_factory=dict)
    grown: dict[str, int] = field(default_factory=dict)
    one_sided: tuple[int, int] = (0, 0)

    def build(self, folder: Path) -> tuple[Path, Path]:
        config = CONFIGS[self.family]() if self.family in CONFIGS else self.family
        base, aligned = build_pair(folder, config, base_dtype=self.base_dtype, aligned_dtype=self.aligned_dtype)
        for side, step in ((base, self.base), (aligned, self.aligned)):
            drop_tied_output(side)
            step(side)
        return base, aligned


def of_head(rows: int) -> dict[str, int]:
    return {EMBED: rows, HEAD: rows}


BARE = partial(Case, "llama-tied", keep_body)
CASES = {
    "tokens added": Case(aligned=partial(add_tokens, tokens=258), grown=of_head(2)),
    "tokens added and padded": Case(
        base=partial(add_tokens, tokens=250), aligned=partial(add_tokens, tokens=300, multiple=64), grown=of_head(70)
    ),
    "tokens added and padded, tied": Case(
        "llama-tied", aligned=partial(add_tokens, tokens=300, multiple=64), grown={EMBED: 64}
    ),
    "tied base": Case("llama-tied", aligned=untie, base_name=tied),
    "tied base, tokens added": Case("llama-tied", aligned=untie_and_add_tokens, base_name=tied, grown=of_head(64)),
    "tied base stores its output": Case("llama-tied", base=store_tied_output),
    "tied base stores its output, untied aligned": Case("llama-tied", base=store_tied_output, aligned=untie),
    "tied aligned stores its output": Case("llama-tied", aligned=store_tied_output, base_name=tied),
    "untied base": Case("llama-tied", base=untie, unmatched="copy", one_sided=(0, 1)),
    "untied base, tied aligned stores its output": Case("llama-tied", base=untie, aligned=store_tied_output),
    "bare base": BARE(base_name=without_model),
    "bare base, tokens added": BARE(aligned=untie_and_add_tokens, base_name=tied_without_model, grown=of_head(64)),
    "bare base, untied": Case(base=keep_body, base_name=without_model, unmatched="copy", one_sided=(1, 0)),
    "bare base, other prefix": Case("gpt2", base=keep_body, base_name=lambda name: name.removeprefix("transformer.")),
    "bare aligned": Case("llama-tied", aligned=keep_body, base_name=with_model, arguments=POOLING),
    "bare aligned, untied": Case(
        aligned=keep_body, base_name=with_model, unmatched="copy", one_sided=(0, 1), arguments=POOLING
    ),
    "bare aligned, other prefix": Case("gpt2", aligned=keep_body, base_name="transformer.{}".format),
    "reward model": Case(aligned=make_reward_model, unmatched="copy", one_sided=(1, 1)),
    "fp32 base": Case(base_dtype=torch.float32, aligned=partial(shard, files=3)),
    "fp32 aligned": Case(aligned_dtype=torch.float32, base=partial(shard, files=3)),
    "shards in other orders": Case(base=partial(shard, files=2), aligned=partial(shard, files=5)),
    "frequencies left in aligned": Case(aligned=leave_frequencies),
    "masks left in aligned": Case("gpt2", aligned=leave_masks),
    "masks left in both": Case("gpt2", base=leave_masks, aligned=leave_masks),
    "MTP in aligned": Case("deepseek_v3", aligned=add_numbered_mtp),
    "MTP in base": Case("deepseek_v3", base=add_numbered_mtp),
    "MTP in both": Case("deepseek_v3", base=add_numbered_mtp, aligned=add_numbered_mtp),
    "named MTP in aligned": Case("qwen3_next", aligned=add_named_mtp),
    "named MTP in base": Case("qwen3_next", base=add_named_mtp),
}


def assert_same_bits(case: Case, folder: Path, **arguments: Any) -> LoadReport:
    """Load both ways and compare; returns expo's report."""
    base, aligned = case.build(folder)
    merged = reference_checkpoint(base, aligned, ALPHA, folder / "merged", case.base_name)
    ours = by_expo(base, ALPHA, unmatched=case.unmatched)
    return compare.assert_same_bits(merged, aligned, ours, **case.arguments, **arguments)


QUICK = {
    "tokens added and padded",
    "tied base, tokens added",
    "tied base stores its output",
    "tied aligned stores its output",
    "untied base",
    "bare base, tokens added",
    "bare base, other prefix",
    "bare aligned, untied",
    "reward model",
    "fp32 base",
    "shards in other orders",
    "masks left in both",
    "MTP in aligned",
    "named MTP in base",
}
"""One case of each kind; the others differ from these in one point and are slow."""


def test_quick_cases_are_cases() -> None:
    assert CASES.keys() > QUICK


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, case in CASES.items()],
)
def test_bits_are_those_of_the_reference(case: Case, tmp_path: Path) -> None:
    report = assert_same_bits(case, tmp_path)
    assert report.grown_rows == case.grown
    assert (report.copied_unmatched, report.ignored_base) == case.one_sided


@pytest.mark.parametrize("name", ["MTP in aligned", "MTP in both"])
def test_speculative_layers_are_those_of_the_reference(name: str, tmp_path: Path) -> None:
    speculative = {"method": "mtp", "num_speculative_tokens": 1}
    assert_same_bits(CASES[name], tmp_path, role="draft", speculative_config=speculative)


@pytest.mark.parametrize("unmatched", ["refuse", "copy"])
def test_value_head_is_not_in_the_way(unmatched: str, tmp_path: Path) -> None:
    """Plain vLLM stops at it; a model without one needs nothing of it."""
    without = Case().build(tmp_path / "without")
    base, aligned = Case(aligned=add_value_head).build(tmp_path / "with")
    with pytest.raises(ValueError, match=re.escape("no module or parameter named 'v_head'")):
        load(aligned)
    states = [
        load(side, **by_expo(other, ALPHA, **more))[0]
        for other, side, more in ((*without, {}), (base, aligned, {"unmatched": unmatched}))
    ]
    assert differing(states[1], states[0]) == []
