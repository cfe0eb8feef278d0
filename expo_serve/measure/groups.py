"""Groups of tensors by what they do in a model, read off their names."""

from __future__ import annotations

import re
from typing import Literal

from expo_serve.checkpoint.records import TensorRecord
from expo_serve.plan.names import is_embedding, is_output

Group = Literal["embeddings", "attention", "mlp", "experts", "norms", "head", "other"]

_PATTERNS: tuple[tuple[Group, re.Pattern[str]], ...] = (
    ("norms", re.compile(r"(norm|(^|[._])ln(_|\d|\.)|layernorm)[^.]*(\.(weight|bias))?$", re.IGNORECASE)),
    ("experts", re.compile(r"(^|[._])experts?([._]|$)|block_sparse_moe", re.IGNORECASE)),
    ("attention", re.compile(r"attn|attention|(^|[._])(q|k|v|o|qkv)_proj|mixer|(^|\.)(wq|wk|wv|wo)\.", re.IGNORECASE)),
    ("mlp", re.compile(r"mlp|ffn|feed_?forward|(gate|up|down)_proj|(^|\.)(fc_?[12in]+|w[123])\.|dense_(h|4h)")),
)
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")


def group_of(record: TensorRecord) -> Group:
    """Return the group of a tensor; the first that its name fits."""
    if is_embedding(record):
        return "embeddings"
    if is_output(record):
        return "head"
    return next((group for group, pattern in _PATTERNS if pattern.search(record.name)), "other")


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a tensor belongs to; None outside of the layers."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None
