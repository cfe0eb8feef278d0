"""The pairs of the ExPO paper (arXiv 2404.16792, Table 7), each as a tiny stand-in with the layout of the real one.

Layouts (files, shards, names, vocabularies, tied or not, code of their own) are those of the public repositories. Where
a repository's list of files was not to be had, the layout is that of its siblings.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.command import run_here
from tests.compare import by_expo, differing, load
from tests.models.raw import same_bits
from tests.models.reference import extrapolate, read_tensors

pytestmark = pytest.mark.engine
HIDDEN, MIDDLE, HEADS, KEY_VALUE_HEADS, LAYERS, HEAD = 64, 96, 4, 2, 2, 16
Shapes = dict[str, tuple[int, ...]]
_CODE = """
from transformers import PretrainedConfig


class InternLM2Config(PretrainedConfig):
    model_type = "internlm2"
"""


def _llama(vocabulary: int) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    wide, narrow = HEADS * HEAD, KEY_VALUE_HEADS * HEAD
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", wide), ("k", narrow), ("v", narrow)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, HIDDEN)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (HIDDEN, wide)
        for name, shape in (("gate", (MIDDLE, HIDDEN)), ("up", (MIDDLE, HIDDEN)), ("down", (HIDDEN, MIDDLE))):
            shapes[f"{prefix}.mlp.{name}_proj.weight"] = shape
        shapes[f"{prefix}.input_layernorm.weight"] = shapes[f"{prefix}.post_attention_layernorm.weight"] = (HIDDEN,)
    return {**shapes, "model.norm.weight": (HIDDEN,), "lm_head.weight": (vocabulary, HIDDEN)}


def _internlm(vocabulary: int) -> Shapes:
    shapes: Shapes = {"model.tok_embeddings.weight": (vocabulary, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.attention.wqkv.weight"] = ((HEADS + 2 * KEY_VALUE_HEADS) * HEAD, HIDDEN)
        shapes[f"{prefix}.attention.wo.weight"] = (HIDDEN, HEADS * HEAD)
        for name, shape in (("w1", (MIDDLE, HIDDEN)), ("w3", (MIDDLE, HIDDEN)), ("w2", (HIDDEN, MIDDLE))):
            shapes[f"{prefix}.feed_forward.{name}.weight"] = shape
        shapes[f"{prefix}.attention_norm.weight"] = shapes[f"{prefix}.ffn_norm.weight"] = (HIDDEN,)
    return {**shapes, "model.norm.weight": (HIDDEN,), "output.weight": (vocabulary, HIDDEN)}


@dataclass(frozen=True)
class Side:
    """How one side is stored."""

    kind: str = "safetensors"
    """Or ``bin``."""
    shards: int = 1
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Pair:
    """One row of the table."""

    alpha: float
    model_type: str
    base: Side
    aligned: Side
    vocabulary: int = 96


BIN2, BIN3, SAFE3, SAFE4, SAFE8 = Side("bin", 2), Side("bin", 3), Side(shards=3), Side(shards=4), Side(shards=8)
PAIRS = {
    "zephyr-7b-alpha": Pair(0.3, "mistral", BIN2, SAFE8),
    "zephyr-7b-beta": Pair(0.1, "mistral", SAFE8, SAFE8),
    "tulu-2-dpo-7b": Pair(0.5, "llama", BIN2, BIN2),
    "tulu-2-dpo-13b": Pair(0.5, "llama", BIN3, SAFE3),
    "tulu-2-dpo-70b": Pair(0.5, "llama", Side("bin", 5), Side(shards=5)),
    "Snorkel-Mistral-PairRM-DPO": Pair(0.3, "mistral", SAFE3, BIN3),
    "LLaMA3-iterative-DPO-final": Pair(0.3, "llama", SAFE4, SAFE4, vocabulary=112),
    "Starling-LM-7B-alpha": Pair(0.2, "mistral", BIN2, SAFE3, vocabulary=98),
    "Starling-LM-7B-beta": Pair(0.5, "mistral", SAFE3, SAFE3, vocabulary=98),
    "internlm2-chat-1_8b": Pair(0.5, "internlm2", Side(shards=2), Side(shards=2)),
    "internlm2-chat-7b": Pair(0.5, "internlm2", SAFE8, SAFE8),
    "zephyr-7b-dpo-full": Pair(0.3, "mistral", SAFE3, SAFE3),
}


ALWAYS = ("tulu-2-dpo-7b", "Snorkel-Mistral-PairRM-DPO", "Starling-LM-7B-alpha", "internlm2-chat-1_8b")
"""One of each kind of layout; the others are slow tests."""


def tensors_of(shapes: Shapes, seed: int) -> dict[str, torch.Tensor]:
    """Random values; seed 1 is a small step from seed 0."""
    torch.manual_seed(0)
    values = {name: torch.randn(shape) * 0.05 for name, shape in shapes.items()}
    torch.manual_seed(seed)
    return {name: (tensor + 0.002 * seed * torch.randn_like(tensor)).bfloat16() for name, tensor in values.items()}


def write(folder: Path, tensors: dict[str, torch.Tensor], side: Side, pair: Pair) -> Path:
    """Write one side as its repository holds it."""
    folder.mkdir(parents=True)
    names = list(tensors)
    size = -(-len(names) // side.shards)
    shards = [names[start : start + size] for start in range(0, len(names), size)]
    stem, suffix = ("pytorch_model", "bin") if side.kind == "bin" else ("model", "safetensors")
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        part = {name: tensors[name].to(side.dtype) for name in shard}
        if side.kind == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config_of(pair)))
    (folder / "tokenizer.json").write_text("{}")
    if pair.model_type == "internlm2":
        (folder / "configuration_internlm2.py").write_text(_CODE)
    return folder


def config_of(pair: Pair) -> dict[str, Any]:
    """The config of both sides."""
    classes = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM", "internlm2": "InternLM2ForCausalLM"}
    config: dict[str, Any] = {
        "model_type": pair.model_type,
        "architectures": [classes[pair.model_type]],
        "hidden_size": HIDDEN,
        "intermediate_size": MIDDLE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "vocab_size": pair.vocabulary,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    if pair.model_type == "internlm2":
        code = {"auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"}, "bias": False}
        return {**config, **code, "rope_scaling": None}
    return config


@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, id=name, marks=[] if name in ALWAYS else [pytest.mark.slow]) for name, pair in PAIRS.items()],
)
def test_pair(pair: Pair, tmp_path: Path) -> None:
    """Through ``inspect``, ``merge`` and a load by vLLM."""
    make: Callable[[int], Shapes] = _internlm if pair.model_type == "internlm2" else _llama
    before, after = (tensors_of(make(pair.vocabulary), seed) for seed in (0, 1))
    base = write(tmp_path / "base", before, pair.base, pair)
    aligned = write(tmp_path / "aligned", after, pair.aligned, pair)
    has_pickles = "bin" in (pair.base.kind, pair.aligned.kind)
    flags = ["--base", str(base), "--aligned", str(aligned), "--alpha", str(pair.alpha)]
    if has_pickles:
        refused = run_here("inspect", *flags)
        assert (refused.returncode, "--allow-pickle-index" in refused.stderr) == (2, True)
        flags.append("--allow-pickle-index")
    inspected = run_here("inspect", *flags, "--json")
    assert inspected.returncode == 0, inspected.stderr
    found = json.loads(inspected.stdout)
    assert (found["counts"], found["warnings"]) == ({"extrapolated": len(after), "copied": 0}, [])
    merged = run_here("merge", *flags, "--out", str(tmp_path / "merged"))
    assert merged.returncode == 0, merged.stderr
    expected = {name: extrapolate(before[name], after[name], pair.alpha, name) for name in after}
    written = read_tensors(tmp_path / "merged")
    assert [name for name in expected if not same_bits(written[name], expected[name])] == []
    code = {"trust_remote_code": True} if pair.model_type == "internlm2" else {}
    more = {"allow_pickle_index": True} if has_pickles else {}
    state, report = load(aligned, **by_expo(base, pair.alpha, **more), **code)
    assert report is not None
    assert differing(state, load(tmp_path / "merged", **code)[0]) == []
