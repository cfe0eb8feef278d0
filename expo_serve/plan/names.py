"""Tells the role of a tensor from its name and shape and from the model's config, for every architecture alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from expo_serve.checkpoint.records import TensorRecord
from expo_serve.shown import plain

# Names that are usual for the input embedding, and for the output projection that may be tied to it.
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embeddings?|shared)\.weight$")
_OUTPUT = re.compile(r"(^|\.)(lm_head|embed_out|output|head)\.(weight|bias)$")
# Buffers that old checkpoints still contain and no model loads.
_LEFTOVER = re.compile(r"(^|\.)(inv_freq|masked_bias|position_ids|rotary_emb\..*)$")
_MTP = re.compile(r"(^|\.)mtp(_\w+)?\.")
_VALUE_HEAD = re.compile(r"(^|\.)v_head\.")
_GENERATES = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$")
# Layers of the language model, whatever wraps it; the layers of a tower are numbered separately.
_LAYER = re.compile(r"^((model|language_model|text_model|llm|transformer|decoder)\.)*layers\.(?P<index>\d+)\.")
_MTP_SIZES = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
LANGUAGE_PARTS = ("text_config", "llm_config", "language_config")
# Parameters of PEFT's adapters: the prefixes of its tuners.
_ADAPTER_PART = re.compile(
    r"(^|\.)(lora_|ia3_|vera_|hada_|lokr_|oft_|boft_|vblora_|randlora_|fourierft_|hra_|bone_|miss_|shira_|c3a_|ln_tuning_|"
    r"modules_to_save(\.|$)|prompt_embeddings|adaption_(prompt|gate)|trainable_tokens_)"
)
NOT_GATHERED = (
    "DeepSpeed ZeRO-3 leaves parameters empty that are not gathered; gather them when saving "
    "(stage3_gather_16bit_weights_on_model_save), or convert the training state with zero_to_fp32.py"
)
"""Why a tensor has no values, and what to do."""
_ROPE_NAMES = {"su": "longrope", "mrope": "default"}
"""Older names of scalings."""
_HEAD = re.compile(r"(?<=.)(LMHeadModel|Model|For[A-Z]\w*)$")
_BODY = re.compile(r"(?<!LMHead)Model$")


def is_embedding(record: TensorRecord) -> bool:
    """Return whether a tensor is the input embedding."""
    return _EMBEDDING.search(record.name) is not None


def is_output(record: TensorRecord) -> bool:
    """Return whether a tensor is the output projection or its bias."""
    return _OUTPUT.search(record.name) is not None


def is_adapter_part(name: str) -> bool:
    """Return whether a tensor belongs to an adapter (of PEFT, most often), and so to no model alone."""
    return _ADAPTER_PART.search(name) is not None


def is_leftover(record: TensorRecord) -> bool:
    """Return whether a tensor is a buffer that no model loads: rotary frequencies, position ids, a causal mask."""
    is_causal_mask = (
        record.name.endswith(".bias")
        and len(record.shape) == 4
        and record.shape[:2] == (1, 1)
        and record.shape[2] == record.shape[3] > 1
    )
    return is_causal_mask or _LEFTOVER.search(record.name) is not None


def is_mtp(record: TensorRecord, config: Mapping[str, object]) -> bool:
    """Return whether a tensor belongs to the multi-token prediction layers, which the model itself does not load.

    These layers have a name of their own, or their numbers follow that of the model's last layer.
    """
    if _MTP.search(record.name):
        return True
    layer = _LAYER.search(record.name)
    return layer is not None and int(layer["index"]) in _mtp_layers(config)


def is_foreign_head(name: str, config: Mapping[str, object]) -> bool:
    """Return whether a tensor belongs to a trainer's value head, in a model that only generates text."""
    architectures = config.get("architectures")
    generates = isinstance(architectures, list) and any(_GENERATES.search(str(kind)) for kind in architectures)
    return generates and _VALUE_HEAD.search(name) is not None


def _mtp_layers(config: Mapping[str, object]) -> range:
    first = max(_sizes(config, "num_hidden_layers"), default=0)
    return range(first, first + max(_sizes(config, *_MTP_SIZES), default=0)) if first else range(0)


def vocabulary_sizes(config: Mapping[str, object]) -> set[int]:
    """Return the vocabulary sizes that a config names."""
    return set(_sizes(config, "vocab_size"))


def ties_embeddings(config: Mapping[str, object]) -> bool | None:
    """Return whether the output projection is the input embedding; None if the config leaves it to the default.

    Transformers has moved the key between the config and its language part. Where the two differ, the value that ties
    is the intended one.
    """
    values = [part.get("tie_word_embeddings") for part in _parts(config)]
    return True if True in values else False if False in values else None


def may_tie_output(base: Mapping[str, object]) -> bool:
    """Return whether an output that base does not store can be its embedding.

    For a body that was saved without its head this is unknown unless the config sets it.
    """
    architectures = base.get("architectures")
    is_body = isinstance(architectures, list) and all(_BODY.search(str(name)) for name in architectures)
    ties = ties_embeddings(base)
    return ties is True or (ties is None and not is_body)


def config_differences(
    one: Mapping[str, object], other: Mapping[str, object], keys: Iterable[str]
) -> dict[str, tuple[object, object]]:
    """Return the settings that both configs give and that differ, with both values: of the whole or its language part.

    Args:
        one: a config.
        other: another one.
        keys: the settings; one that a config leaves to its default is not compared.
    """
    values = [
        {key: part[key] for part in _parts(config) for key in keys if part.get(key) is not None}
        for config in (one, other)
    ]
    return {
        key: (values[0][key], values[1][key])
        for key in keys
        if key in values[0] and key in values[1] and values[0][key] != values[1][key]
    }


def described(differences: Mapping[str, tuple[object, object]]) -> str:
    """Return differences of two configs for a message: ``a is 1 in base and 2 in aligned``."""
    return ", ".join(
        f"{key} is {plain(one)} in base and {plain(two)} in aligned" for key, (one, two) in differences.items()
    )


def rope_of(config: Mapping[str, object]) -> dict[str, object]:
    """Return how a config turns positions: the base of the angles, and the scaling unless it is the default.

    Transformers 5 keeps both under one key, ``rope_parameters``.
    """
    found: dict[str, object] = {"rope type": "default"}
    for part in _parts(config):
        for nested in (part.get("rope_scaling"), part.get("rope_parameters")):
            if not isinstance(nested, dict):
                continue
            if any(isinstance(value, dict) for value in nested.values()):  # one for each type of layer
                return {}
            kind = nested.get("rope_type") or nested.get("type") or "default"
            found["rope type"] = _ROPE_NAMES.get(kind, kind) if isinstance(kind, str) else kind
            found.update({key: nested[key] for key in ("factor", "rope_theta") if nested.get(key) is not None})
        if isinstance(part.get("rope_theta"), int | float):
            found["rope_theta"] = part["rope_theta"]
    return found


def is_layer(name: str) -> bool:
    """Return whether a tensor belongs to a numbered layer of the language model."""
    return _LAYER.search(name) is not None


def is_language_part(part: Mapping[str, object], whole: Mapping[str, object]) -> bool:
    """Return whether one config is that of the language part alone of a multimodal model with the other config."""
    kind = part.get("model_type")
    has_parts = any(isinstance(part.get(key), dict) for key in LANGUAGE_PARTS)
    parts = (whole.get(key) for key in LANGUAGE_PARTS)
    return (
        kind is not None
        and not has_parts
        and any(isinstance(one, dict) and one.get("model_type") == kind for one in parts)
    )


def architecture_stems(config: Mapping[str, object]) -> object:
    """Return the architectures without their heads: a body that was saved alone differs from the whole in the head."""
    names = config.get("architectures")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return names
    return [_HEAD.sub("", name) for name in names]


def _parts(config: Mapping[str, object]) -> Iterable[Mapping[str, object]]:
    """Yield a config and, for a multimodal model, its language part."""
    candidates = (config, *(config.get(key) for key in LANGUAGE_PARTS))
    return (part for part in candidates if isinstance(part, dict))


def _sizes(config: Mapping[str, object], *keys: str) -> list[int]:
    values = (part.get(key) for part in _parts(config) for key in keys)
    return [value for value in values if isinstance(value, int)]
