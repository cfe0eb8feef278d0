"""The files of a PEFT LoRA adapter: adapter_config.json and adapter_model.safetensors.

An adapter holds two factors for each module that it changes: ``base_model.model.MODULE.lora_A.weight`` (rank by inputs)
and ``lora_B.weight`` (outputs by rank), for an embedding ``lora_embedding_A`` (rank by rows) and ``lora_embedding_B``
(width by rank). Tensors that were trained whole (``modules_to_save``, biases) are stored under their plain names.

Only an adapter that is a plain sum on base's weights can be extrapolated; every other kind is refused here.
Format: https://huggingface.co/docs/peft/developer_guides/checkpoint; the keys of the config and their meaning:
https://huggingface.co/docs/peft/package_reference/lora (LoraConfig).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from expo_serve.checkpoint.file_names import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS
from expo_serve.checkpoint.links import is_file
from expo_serve.checkpoint.records import TensorRecord
from expo_serve.errors import CheckpointError, count_of
from expo_serve.plan.names import NOT_GATHERED, is_adapter_part
from expo_serve.plan.tensor_deltas import LoraModule
from expo_serve.shown import plain, shown

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<kind>embedding_)(?P<row>[AB])(?:\.(?P<of>[^.]+)(?:\.(?P=of))*)?"
    r"|(?P<side>[AB])(?:\.(?P<name>[^.]+)(?:\.(?P=name))*)?\.weight)"
)
"""A factor's name. PEFT leaves the adapter's name out; what trainers save themselves has it (``lora_A.default``), twice
if they saved what they had loaded under such names."""
_WHOLE = re.compile(r"\.modules_to_save(?:\.(?P<name>[^.]+)(?=\.(?:weight|bias)$))?")

# Keys under which the result is not the sum of base's weight and B A, or under which more than weights change.
_REFUSED = {
    "use_dora": "DoRA also scales the columns by a learned magnitude",
    "use_qalora": "QALoRA works on base weights that are quantised in groups",
    "layer_replication": "layer replication gives the model more layers than base has",
    "alora_invocation_tokens": "an activated LoRA applies only to the tokens after its invocation",
    "trainable_token_indices": "trainable tokens replace single rows of the embedding",
    "target_parameters": "adapters on parameters instead of modules are not supported",
    "lora_bias": "a bias in B is added to the module's output",
    "arrow_config": "Arrow routes between several adapters",
    "use_bdlora": "block-diagonal LoRA stores its factors in blocks",
    "kasa_config": "KaSA also changes base's own singular values",
    "monteclora_config": "MonteCLoRA samples its factors",
    "enable_lora": "adapters of some parts of a fused layer, of PEFT before 0.3, store their factors in groups",
}
_REFUSED_STARTS = {
    "pissa": "PiSSA takes the adapter's first values out of base's weights",
    "olora": "OLoRA takes the adapter's first values out of base's weights",
    "corda": "CorDA takes the adapter's first values out of base's weights",
    "lora_ga": "LoRA-GA takes the adapter's first values out of base's weights",
    "loftq": "LoftQ starts from a quantised base",
}
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
# Keys that describe the training, not the result.
_HARMLESS = frozenset(
    {"auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config"}
    | {"exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"}
    | {"layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config"}
    | {"megatron_core", "merge_weights", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r"}
    | {"rank_pattern", "alpha_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora"}
    | {"velora_config"}
)

_MAX_PATTERN = 1000
_MAX_REPEATS, _MAX_OPTIONAL = 3, 10
"""Of a pattern: each repetition multiplies the ways to match by a name's length, each optional part by two."""
_MAX_ALPHA = 1e9
"""A larger lora_alpha is a mistake, or not a number."""


@dataclass(frozen=True)
class LoraConfig:
    """The keys of adapter_config.json on which the result depends."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    base: str | None
    """Name of the model that the adapter was trained on, as its trainer wrote it: a hub id or a path."""
    bias: str = "none"
    """Which of base's biases were trained: ``none``, ``all``, or those of the adapted modules (``lora_only``)."""
    is_tied: bool = False
    """True if a tied output was adapted together with the embedding, by the same values."""

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's factors."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """Return a module's scale: alpha divided by the rank, or by its square root (rsLoRA, arXiv 2312.03732)."""
        rank = self.rank_of(module)
        alpha = float(_by_pattern(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """Look a module up as PEFT does: a pattern is a regular expression for the end of its name."""
    return next((value for key, value in patterns.items() if _compiled(key).match(module)), default)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Compile a pattern once: an adapter may have one for each of its modules, more than ``re`` itself keeps.

    Raises:
        re.error: it is no regular expression.
        OverflowError: a number in it is too large.
        RecursionError: it has too many groups in each other.
    """
    return re.compile(rf"(.*\.)?({pattern})$")


def read_lora_config(values: Mapping[str, object], where: str) -> LoraConfig:
    """Check an adapter's config.

    Args:
        values: the content of its adapter_config.json.
        where: the path of that file, for messages.

    Raises:
        CheckpointError: the adapter is no LoRA or not a plain sum, or a rank or an alpha is invalid.
    """
    _refuse_other_kinds(values, where)
    base = values.get("base_model_name_or_path")
    return LoraConfig(
        rank=_rank(values.get("r"), "r", where),
        alpha=_alpha(values.get("lora_alpha", 8), "lora_alpha", where),
        rank_pattern={key: _rank(value, key, where) for key, value in _patterns(values, "rank_pattern", where)},
        alpha_pattern={key: _alpha(value, key, where) for key, value in _patterns(values, "alpha_pattern", where)},
        use_rslora=bool(values.get("use_rslora")),
        base=base if isinstance(base, str) and base else None,
        bias=str(values.get("bias") or "none"),
        is_tied=bool(values.get("ensure_weight_tying")),
    )


def _rank(value: object, key: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{where}: rank {shown(key)}: expected a whole number from 1, found {shown(value)}")
    return value


def _alpha(value: object, key: str, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _MAX_ALPHA:
        raise CheckpointError(f"{where}: {shown(key)}: expected a number up to {_MAX_ALPHA:.0e}, found {shown(value)}")
    return float(value)


def _patterns(values: Mapping[str, object], key: str, where: str) -> Iterator[tuple[str, object]]:
    patterns = values.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{where}: {key} must be an object, found {shown(patterns)}")
    for pattern, value in patterns.items():
        if len(pattern) > _MAX_PATTERN or _may_take_forever(pattern):
            raise CheckpointError(
                f"{where}: pattern {pattern!r:.100} is long, repeats a group, or repeats more than {_MAX_REPEATS} "
                "times; expected the end of a module's name"
            )
        try:
            _compiled(pattern)
        except (re.error, OverflowError, RecursionError) as error:  # the others: a huge number, too many groups
            raise CheckpointError(f"{where}: pattern {pattern!r:.100} is not a regular expression: {error}") from None
        yield pattern, value


def _may_take_forever(pattern: str) -> bool:
    """Return whether matching may go through too many ways to divide a name among the pattern's repetitions."""
    bare = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "", pattern, flags=re.DOTALL)
    repeats, optional = (len(re.findall(sign, bare)) for sign in (r"[*+{]", r"(?<!\()\?"))
    return repeats > _MAX_REPEATS or optional > _MAX_OPTIONAL or re.search(r"\)[*+{]", pattern) is not None


def _refuse_other_kinds(values: Mapping[str, object], where: str) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{where}: peft_type is {shown(kind)}: only LORA is a plain sum on base's weights; merge the adapter with "
            "PEFT if it can be merged, and give the result as --aligned"
        )
    start = values.get("init_lora_weights")
    reason = _start_problem(start) if isinstance(start, str) else None
    for key, value in values.items():
        if value and key in _REFUSED:
            reason = f"{key}: {_REFUSED[key]}"
        elif value and key not in _HARMLESS:
            reason = f"{plain(key)} is set ({shown(value, 60)}), and its meaning is not known to this version"
    if reason:
        raise CheckpointError(
            f"{where}: this adapter is not a plain sum on base's weights ({reason}); merge it with PEFT if it can "
            "be merged, and give the result as --aligned"
        )


def _start_problem(start: str) -> str | None:
    for prefix, reason in _REFUSED_STARTS.items():
        if start.lower().startswith(prefix):
            advice = "PEFT's path_initial_model_for_weight_conversion converts it"
            return f"init_lora_weights {shown(start, 60)}: {reason}; {advice}"
    return None if start in _PLAIN_STARTS else f"init_lora_weights {start!r:.60} is not known to this version"


def nothing_to_read(folder: Path) -> str:
    """Return why a folder without adapter_model.safetensors cannot be read, for an error."""
    if is_file(folder / ADAPTER_PICKLE):
        return (
            f"{folder} holds its adapter as a pickle file only ({ADAPTER_PICKLE}), which can run code and is not "
            "opened; convert it to safetensors, or give --allow-pickle-index: it finds the tensors without running "
            "anything"
        )
    return f"{folder} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}"


def sort_tensors(
    tensors: Mapping[str, TensorRecord], config: LoraConfig
) -> tuple[tuple[LoraModule, ...], dict[str, TensorRecord]]:
    """Sort an adapter's tensors into modules and tensors that were trained whole.

    Args:
        tensors: all tensors by their names in the file.
        config: the adapter's config, which gives the ranks and scales.

    Returns:
        The modules, and the whole tensors by base's names for them.

    Raises:
        CheckpointError: a module lacks a factor, or its factors do not have the rank that the config gives it.
    """
    factors: defaultdict[str, dict[str, TensorRecord]] = defaultdict(dict)
    whole: dict[str, TensorRecord] = {}
    adapters: set[str] = set()
    _refuse_empty(tensors)
    for name, record in tensors.items():
        plain = name.removeprefix(_PREFIX)
        if match := _FACTOR.fullmatch(plain):
            part = (match["row"] or match["side"]) + (".embedding" if match["kind"] else "")
            _refuse_second(factors[match["module"]].setdefault(part, record), record)
            adapters.update(filter(None, (match["of"], match["name"])))
            continue
        if is_adapter_part(plain) and ".modules_to_save" not in plain:
            raise CheckpointError(
                f"{record.file}: tensor {name!r} is a part of an adapter that is no plain sum on base's weights, or of "
                "a kind that is not known; merge the adapter with PEFT and give the result as --aligned"
            )
        stored = _WHOLE.search(plain)
        adapters.update(filter(None, (stored["name"] if stored else None,)))
        bare = _WHOLE.sub("", plain).replace(".base_layer", "").replace(".original_module", "")
        _refuse_second(whole.setdefault(bare, record), record)
    if len(adapters) > 1:
        raise CheckpointError(
            f"{next(iter(tensors.values())).file}: holds {len(adapters)} adapters ({', '.join(sorted(adapters)[:5])}); "
            "save each in a folder of its own"
        )
    modules = tuple(_module(name, parts, config) for name, parts in factors.items())
    if modules and not whole and not any(module.scale for module in modules):
        raise CheckpointError(
            f"{modules[0].a.file}: {ADAPTER_CONFIG} gives every module the alpha 0, so the adapter changes nothing; "
            "give lora_alpha the value of its training"
        )
    return modules, whole


def _refuse_empty(tensors: Mapping[str, TensorRecord]) -> None:
    empty = [record for record in tensors.values() if not record.numel]
    if empty:
        raise CheckpointError(
            f"{empty[0].file}: {count_of(len(empty), 'tensor has', 'tensors have')} no values, the first "
            f"{empty[0].name!r} {list(empty[0].shape)}: {NOT_GATHERED}"
        )


def _refuse_second(first: TensorRecord, record: TensorRecord) -> None:
    if first is not record:
        raise CheckpointError(
            f"{record.file}: {first.name!r} and {record.name!r} are the same part of an adapter; save one adapter alone"
        )


def _module(name: str, parts: Mapping[str, TensorRecord], config: LoraConfig) -> LoraModule:
    is_embedding = any("embedding" in part for part in parts)
    ending = ".embedding" if is_embedding else ""
    a, b = parts.get(f"A{ending}"), parts.get(f"B{ending}")
    found = next(iter(parts.values()))
    if a is None or b is None or len(parts) != 2:
        raise CheckpointError(
            f"{found.file}: module {name!r} has no {'A' if a is None else 'B'}: expected both factors of an adapter; "
            f"found {', '.join(record.name for record in parts.values())}"
        )
    rank = config.rank_of(name)
    if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{found.file}: module {name!r} has factors A {list(a.shape)} and B {list(b.shape)}, but {ADAPTER_CONFIG} "
            f"gives it the rank {rank}"
        )
    if not (a.is_float and b.is_float):
        raise CheckpointError(
            f"{found.file}: module {name!r} has factors of dtype {a.dtype} and {b.dtype}; expected floating point"
        )
    return LoraModule(name, a, b, config.scale_of(name), is_embedding)
