"""Hypothesis strategies: files that follow their format's structure, with values of any kind in it."""

from __future__ import annotations

import json
from typing import Any

import yaml
from hypothesis import strategies as st

from expo_serve.config import ExpoConfig
from expo_serve.plan.lora_format import _HARMLESS, _REFUSED
from expo_serve.plan.packed_format import _KEYS, _digest
from loadtests.fuzz.changes import NUMBERS, TEXTS, joined
from loadtests.fuzz.layouts import KINDS, NAMES, TARGETS
from tests.models.adapters import CONFIG as ADAPTER
from tests.models.raw import CONFIG, tiny_tensors

_SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I8": 1, "U8": 1, "BOOL": 1}
_MODEL_KEYS = (
    *CONFIG, "text_config", "llm_config", "language_config", "quantization_config", "quantization", "auto_map",
    "compression_config", "quant_method", "mode", "rope_scaling", "rope_parameters", "rope_theta", "rope_type",
    "factor", "num_nextn_predict_layers", "mtp_num_hidden_layers", "_name_or_path", "hidden_act", "vision_config",
)  # fmt: skip
_MODEL_NAMES = tuple(tiny_tensors())
_PARTS = (
    "model", "layers", "0", "1", "language_model", "module", "_orig_mod", "self_attn", "q_proj", "qkv_proj", "mlp",
    "experts", "gate_up_proj", "up_proj", "embed_tokens", "wte", "lm_head", "visual", "mtp", "v_head", "base_model",
    "lora_A", "lora_B", "lora_embedding_A", "modules_to_save", "default", "base_layer", "inv_freq", "absmax", "scales",
    "blocks", "weight", "bias", "_flat_param", "h", "c_attn", "transformer", "norm", "99", "block_sparse_moe", "w1",
)  # fmt: skip

texts = st.one_of(st.sampled_from(TEXTS), st.text(max_size=20))
names = st.one_of(
    st.sampled_from(_MODEL_NAMES), st.lists(st.sampled_from(_PARTS), min_size=1, max_size=7).map(".".join), texts
)
values = st.recursive(
    st.one_of(st.none(), st.sampled_from(NUMBERS), st.integers(), st.floats(), texts, st.sampled_from(_MODEL_KEYS)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.sampled_from(_MODEL_KEYS), texts), inner, max_size=4)
    ),
    max_leaves=8,
)
shapes = st.lists(st.sampled_from((0, 1, 2, 8, 12, 16, 17)), max_size=4)
"""Of tensors: at most 640 kB of data."""


def as_json(value: Any) -> bytes:
    """Return JSON in UTF-8, lone surrogates as they are."""
    return json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")


def _file(tensors: dict[str, tuple[str, list[int]]], metadata: Any) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, size = end, _SIZES[dtype]
        for length in shape:
            size *= length
        end = begin + size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return joined(as_json(header), bytes(end))


_BASE = {name: ("BF16", list(tensor.shape)) for name, tensor in tiny_tensors().items()}
_tensors = st.dictionaries(names, st.tuples(st.sampled_from(sorted(_SIZES)), shapes), max_size=6)
_NONE: dict[str, tuple[str, list[int]]] = {}
_few = st.one_of(st.just(_NONE), _tensors)
_like_base = st.sets(st.sampled_from(_MODEL_NAMES), max_size=2).map(
    lambda left_out: {name: entry for name, entry in _BASE.items() if name not in left_out}
)
_metadata = st.one_of(st.none(), st.just({"format": "pt"}), values)
safetensors = st.builds(lambda base, more, metadata: _file({**base, **more}, metadata), _like_base, _few, _metadata)


def _adapter(modules: list[tuple[str, list[int], list[int]]], more: dict[str, tuple[str, list[int]]]) -> bytes:
    tensors = dict(more)
    for name, a, b in modules:
        tensors[f"base_model.model.{name}.lora_A.weight"] = ("F32", a)
        tensors[f"base_model.model.{name}.lora_B.weight"] = ("F32", b)
    return _file(tensors, {"format": "pt"})


_modules = st.sampled_from([name.removesuffix(".weight") for name in _MODEL_NAMES] + ["lm_head", "model.x", "a.b"])
_two = st.one_of(st.just([2, 8]), shapes), st.one_of(st.just([8, 2]), shapes)
adapter = st.builds(_adapter, st.lists(st.tuples(st.one_of(_modules, names), *_two), max_size=4), _few)

patterns = st.dictionaries(
    st.one_of(texts, st.text("abq_proj.*+?()[]{}|\\^$,0123456789:<=!P#-", max_size=60)), values, max_size=3
)
_adapter_keys = st.sampled_from(sorted({*_REFUSED, *_HARMLESS}))
adapter_config = st.builds(
    lambda more, ranks, alphas, has: as_json({**ADAPTER, "rank_pattern": ranks, "alpha_pattern": alphas, **more})
    if has
    else as_json({**ADAPTER, **more}),
    st.dictionaries(st.one_of(_adapter_keys, texts), values, max_size=3), patterns, patterns, st.booleans(),
)  # fmt: skip

config = st.builds(
    lambda more, nested: as_json({**CONFIG, **more, **({"text_config": {**CONFIG, **nested}} if nested else {})}),
    st.dictionaries(st.sampled_from(_MODEL_KEYS), values, max_size=4),
    st.dictionaries(st.sampled_from(_MODEL_KEYS), values, max_size=3),
)

_STEMS = ("model-{}.safetensors", "pytorch_model-{}.bin")
_NUMBERS = ("00001-of-00002", "00002-of-00002")
_shards = st.sampled_from([*(stem.format(number) for stem in _STEMS for number in _NUMBERS), "config.json"])
_WHOLE_MAP = {name: f"model-0000{1 + (number > 3)}-of-00002.safetensors" for number, name in enumerate(_MODEL_NAMES)}
index = st.builds(
    lambda is_whole, weight_map, more: as_json(
        {"metadata": {}, "weight_map": {**(_WHOLE_MAP if is_whole else {}), **weight_map}, **more}
    ),
    st.booleans(),
    st.dictionaries(names, st.one_of(_shards, texts, values), max_size=4),
    st.dictionaries(texts, values, max_size=2),
)

_flags = st.sampled_from(
    [name.replace("_", "-") for name in ExpoConfig.model_fields] + ["alpha-rule", "pair", "hf-token", "download-dir"]
)
_folders = st.sampled_from(("base", "aligned", "adapter", "packed", "full", "org/name", "gone", "flags.yaml"))
_settings = st.dictionaries(_flags, st.one_of(values, _folders, patterns), max_size=4)
flags = st.builds(
    lambda more, folder: yaml.safe_dump({"base": "base", "aligned": folder, "alpha": 0.5, **more}).encode(
        errors="surrogatepass"
    ),
    _settings,
    _folders,
)

tokenizer = st.builds(
    lambda vocabulary, added, more: as_json({"model": {"vocab": vocabulary}, "added_tokens": added, **more}),
    st.one_of(st.dictionaries(texts, values, max_size=5), st.lists(values, max_size=5), values),
    st.one_of(
        st.lists(st.one_of(st.fixed_dictionaries({"id": values, "content": values}), values), max_size=4), values
    ),
    st.dictionaries(texts, values, max_size=2),
)
settings_of_tokenizer = st.dictionaries(
    st.one_of(st.sampled_from(("chat_template", "auto_map", "AutoTokenizer")), texts), values, max_size=4
).map(as_json)

_entry = st.fixed_dictionaries(
    {"dtype": st.one_of(st.sampled_from(sorted(_SIZES)), values), "shape": st.one_of(shapes, values),
     "base": st.one_of(st.none(), st.tuples(names, st.sampled_from(sorted(_SIZES)), shapes), values),
     "extrapolated": st.one_of(st.booleans(), values), "table": st.one_of(st.just("0" * 16), values)}
)  # fmt: skip


def _packed(entries: dict[str, Any], files: Any, block: Any, base: Any, length: int) -> bytes:
    raw = ("1", str(files), str(block), json.dumps(base), json.dumps(entries))
    metadata = {**dict(zip(_KEYS, raw, strict=True)), "checksum": _digest(raw)}
    return _file({name: ("U8", [length]) for name in entries}, metadata)


packed = st.builds(
    _packed,
    st.dictionaries(names, st.one_of(_entry, values), max_size=4),
    st.one_of(st.just(1), values),
    st.one_of(st.sampled_from((1, 64, 2**20, 2**24)), values),
    st.one_of(st.just({"name": "base"}), values),
    st.sampled_from((0, 32, 64, 4096)),
)

layout = st.lists(
    st.tuples(
        st.one_of(st.sampled_from(NAMES), texts), st.sampled_from(KINDS),
        st.one_of(st.sampled_from(TARGETS), st.sampled_from(("config.json", "model.safetensors", "{}")), texts),
    ),
    max_size=8,
).map(as_json)  # fmt: skip

SHAPES: dict[str, st.SearchStrategy[bytes]] = {
    "safetensors": safetensors,
    "full delta": safetensors,
    "packed delta": packed,
    "adapter": adapter,
    "adapter config": adapter_config,
    "index": index,
    "config": config,
    "base config": config,
    "tokenizer": tokenizer,
    "tokenizer config": settings_of_tokenizer,
    "yaml": flags,
    "pickle index": index,
    "layout": layout,
}
"""By format; what a pickle is made of, ``loadtests.fuzz_pickle`` changes better."""
