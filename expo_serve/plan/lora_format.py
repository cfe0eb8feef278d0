"""What a PEFT LoRA adapter's ``adapter_config.json`` says, as far as it is a plain sum on base's weights.

Keys and their meaning: https://huggingface.co/docs/peft/package_reference/lora (LoraConfig).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expo_serve.checkpoint.records import TensorRecord
from expo_serve.errors import CheckpointError
from expo_serve.plan.tensor_deltas import LoraModule

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
_FACTORS = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "A", ".lora_embedding_B": "B",
}  # fmt: skip

# What these mean is no plain sum of base's weight and B A, or changes more than weights.
_REFUSED = {
    "use_dora": "DoRA also scales the columns by a learned magnitude",
    "use_qalora": "QALoRA works on base weights that are quantised in groups",
    "layer_replication": "layer replication gives the model more layers than base has",
    "alora_invocation_tokens": "an activated LoRA holds for tokens after its invocation only",
    "trainable_token_indices": "trainable tokens replace single rows of the embedding",
    "target_parameters": "adapters on parameters instead of modules are not read yet",
    "lora_bias": "a bias in B is added to the module's output",
    "arrow_config": "Arrow routes between several adapters",
    "use_bdlora": "block-diagonal LoRA stores its factors in blocks",
    "kasa_config": "KaSA also changes base's own singular values",
    "monteclora_config": "MonteCLoRA samples its factors",
}
_REFUSED_STARTS = {
    "pissa": "PiSSA takes the adapter's first values out of base's weights",
    "olora": "OLoRA takes the adapter's first values out of base's weights",
    "corda": "CorDA takes the adapter's first values out of base's weights",
    "lora_ga": "LoRA-GA takes the adapter's first values out of base's weights",
    "loftq": "LoftQ stands on a quantised base",
}
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
# They say how it was trained, or where; not what it is.
_HARMLESS = frozenset(
    {"auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config"}
    | {"exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"}
    | {"layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config"}
    | {"megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern"}
    | {"alpha_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora", "velora_config"}
)


_MOST = 1e9
"""Of an alpha: more is a mistake, or no number."""


@dataclass(frozen=True)
class LoraConfig:
    """The part that the numbers depend on."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    base: str | None
    """Which model it was trained on, as its trainer called it."""

    def rank_of(self, module: str) -> int:
        """The rank of a module's factors."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """What a module's product is multiplied with: alpha by the rank, or by its root (rsLoRA, arXiv 2312.03732)."""
        rank = self.rank_of(module)
        alpha = float(_by_pattern(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """As PEFT looks a module up: a pattern is a regular expression for the end of its name."""
    return next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)),
        default,
    )


def read_lora_config(values: Mapping[str, Any], where: str) -> LoraConfig:
    """Check an adapter's config.

    Args:
        values: the content of its adapter_config.json.
        where: that file, for messages.

    Raises:
        CheckpointError: it is no LoRA, one that is no plain sum, or its numbers are none.
    """
    _refuse_other_kinds(values, where)
    rank: Any = values.get("r")
    alpha: Any = values.get("lora_alpha", 8)
    ranks, alphas = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        raise CheckpointError(f"{where}: rank_pattern and alpha_pattern must be objects")
    for key, number in (("r", rank), *ranks.items()):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise CheckpointError(f"{where}: rank {key!r}: expected a number from 1, found {number!r:.100}")
    for key, number in (("lora_alpha", alpha), *alphas.items()):
        if not isinstance(number, int | float) or isinstance(number, bool) or not abs(number) <= _MOST:
            raise CheckpointError(f"{where}: {key!r}: expected a number, found {number!r:.100}")
    for key in (*ranks, *alphas):
        _check_pattern(key, where)
    base = values.get("base_model_name_or_path")
    return LoraConfig(
        rank=rank,
        alpha=float(alpha),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=bool(values.get("use_rslora")),
        base=base if isinstance(base, str) and base else None,
    )


def _check_pattern(key: str, where: str) -> None:
    try:
        re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise CheckpointError(f"{where}: pattern {key!r:.100} is not a regular expression: {error}") from None


def _refuse_other_kinds(values: Mapping[str, Any], where: str) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{where}: peft_type is {kind!r:.100}: only LORA is a plain sum on base's weights")
    start = values.get("init_lora_weights")
    reason = _start_problem(start) if isinstance(start, str) else None
    for key, value in values.items():
        if value and key in _REFUSED:
            reason = f"{key}: {_REFUSED[key]}"
        elif value and key not in _HARMLESS:
            reason = f"{key} is set ({value!r:.60}), and what it means is not known here"
    if reason:
        raise CheckpointError(
            f"{where}: this adapter is not a plain sum on base's weights ({reason}); merge it with PEFT and give "
            "--aligned instead"
        )


def _start_problem(start: str) -> str | None:
    for prefix, reason in _REFUSED_STARTS.items():
        if start.lower().startswith(prefix):
            return f"init_lora_weights {start!r}: {reason}; PEFT's path_initial_model_for_weight_conversion converts it"
    return None if start in _PLAIN_STARTS else f"init_lora_weights {start!r:.60} is not known here"


def nothing_to_read(folder: Path) -> str:
    if (folder / _PICKLE).exists():
        return (
            f"{folder} holds its adapter as a pickle file only ({_PICKLE}), which can run code and is never opened; "
            "convert it to safetensors"
        )
    return f"{folder} has {CONFIG_FILE} but no {WEIGHTS_FILE}"


def sort_tensors(
    tensors: Mapping[str, TensorRecord],
) -> tuple[dict[str, dict[str, TensorRecord]], dict[str, TensorRecord]]:
    """The factors by module, and what was trained whole by name."""
    factors: defaultdict[str, dict[str, TensorRecord]] = defaultdict(dict)
    whole: dict[str, TensorRecord] = {}
    for name, record in tensors.items():
        plain = name.removeprefix(_PREFIX)
        ending = next((ending for ending in _FACTORS if plain.endswith(ending)), None)
        if ending is None:
            whole[plain.replace(".modules_to_save", "").replace(".base_layer", "")] = record
            continue
        part = _FACTORS[ending] + (".embedding" if "embedding" in ending else "")
        factors[plain.removesuffix(ending)][part] = record
    return factors, whole


def make_module(name: str, parts: dict[str, TensorRecord], lora: LoraConfig) -> LoraModule:
    is_embedding = any("embedding" in part for part in parts)
    ending = ".embedding" if is_embedding else ""
    a, b = parts.get(f"A{ending}"), parts.get(f"B{ending}")
    there = next(iter(parts.values()))
    if a is None or b is None or len(parts) != 2:
        raise CheckpointError(
            f"{there.file}: module {name!r} has no {'A' if a is None else 'B'}: expected both factors of an adapter; "
            f"found {', '.join(record.name for record in parts.values())}"
        )
    rank = lora.rank_of(name)
    if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{there.file}: module {name!r} has factors A {list(a.shape)} and B {list(b.shape)}, which do not have the "
            f"rank that {CONFIG_FILE} gives it ({rank})"
        )
    if not (a.is_float and b.is_float):
        raise CheckpointError(f"{there.file}: module {name!r} has factors of dtype {a.dtype} and {b.dtype}")
    return LoraModule(name, a, b, lora.scale_of(name), is_embedding)
