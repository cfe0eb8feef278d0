"""What a tensor's name and shape and a model's config say of its part in the model, whatever the architecture."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from expo_serve.checkpoint.records import TensorRecord

# Field-wide names of the input embedding and of the output projection that may be tied to it.
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embeddings?|shared)\.weight$")
_OUTPUT = re.compile(r"(^|\.)(lm_head|embed_out|output|head)\.(weight|bias)$")
# Buffers that old checkpoints carry along and no model loads.
_LEFTOVER = re.compile(r"(^|\.)(inv_freq|masked_bias|position_ids|rotary_emb\..*)$")
_MTP = re.compile(r"(^|\.)mtp(_\w+)?\.")
_VALUE_HEAD = re.compile(r"(^|\.)v_head\.")
_GENERATES = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$")
# Of the language model, whatever it is wrapped in; a tower's layers have numbers of their own.
_LAYER = re.compile(r"^((model|language_model|text_model|llm|transformer|decoder)\.)*layers\.(?P<index>\d+)\.")
_MTP_SIZES = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
_LANGUAGE_PARTS = ("text_config", "llm_config", "language_config")
_HEAD = re.compile(r"(?<=.)(LMHeadModel|Model|For[A-Z]\w*)$")
_BODY = re.compile(r"(?<!LMHead)Model$")


def is_embedding(record: TensorRecord) -> bool:
    """Whether it is the input embedding."""
    return _EMBEDDING.search(record.name) is not None


def is_output(record: TensorRecord) -> bool:
    """Whether it is the output projection or its bias."""
    return _OUTPUT.search(record.name) is not None


def is_leftover(record: TensorRecord) -> bool:
    """Whether it is a buffer of old code that no model loads: rotary frequencies, position ids, a causal mask."""
    is_causal_mask = (
        record.name.endswith(".bias")
        and len(record.shape) == 4
        and record.shape[:2] == (1, 1)
        and record.shape[2] == record.shape[3] > 1
    )
    return is_causal_mask or _LEFTOVER.search(record.name) is not None


def is_mtp(record: TensorRecord, config: dict[str, Any]) -> bool:
    """Whether it belongs to the multi-token prediction layers, which the model itself does not load.

    They stand under a name of their own, or are numbered on from the model's last layer.
    """
    if _MTP.search(record.name):
        return True
    layer = _LAYER.search(record.name)
    return layer is not None and int(layer["index"]) in _mtp_layers(config)


def is_foreign_head(name: str, config: dict[str, Any]) -> bool:
    """Whether it is of the value head that a trainer puts beside the output, in a model that only generates text."""
    architectures = config.get("architectures")
    generates = isinstance(architectures, list) and any(_GENERATES.search(str(kind)) for kind in architectures)
    return generates and _VALUE_HEAD.search(name) is not None


def _mtp_layers(config: dict[str, Any]) -> range:
    first = max(_sizes(config, "num_hidden_layers"), default=0)
    return range(first, first + max(_sizes(config, *_MTP_SIZES), default=0)) if first else range(0)


def vocabulary_sizes(config: dict[str, Any]) -> set[int]:
    """The vocabulary sizes that a config names."""
    return set(_sizes(config, "vocab_size"))


def ties_embeddings(config: dict[str, Any]) -> bool | None:
    """Whether the output projection is the input embedding; None where a config leaves it to its default.

    Transformers has moved the key between the language part of a config and the whole: where the two
    differ, the one that ties is the one that was meant.
    """
    said = [part.get("tie_word_embeddings") for part in _parts(config)]
    return True if True in said else False if False in said else None


def may_tie_output(base: dict[str, Any]) -> bool:
    """Whether an output that base does not store can be its embedding. A body saved alone had one of its own or not."""
    architectures = base.get("architectures")
    is_body = isinstance(architectures, list) and all(_BODY.search(str(name)) for name in architectures)
    says = ties_embeddings(base)
    return says is True or (says is None and not is_body)


def architecture_stems(config: dict[str, Any]) -> object:
    """The architectures without the head that a class name ends in: a body saved alone has another than the whole."""
    names = config.get("architectures")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return names
    return [_HEAD.sub("", name) for name in names]


def _parts(config: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """A config and, in one of several modalities, its language part."""
    candidates = (config, *(config.get(key) for key in _LANGUAGE_PARTS))
    return (part for part in candidates if isinstance(part, dict))


def _sizes(config: dict[str, Any], *keys: str) -> list[int]:
    values = (part.get(key) for part in _parts(config) for key in keys)
    return [value for value in values if isinstance(value, int)]
