"""Recognises quantised checkpoints: by their config, by quantisers' own files, and by the tensors themselves.

The numbers of a quantised checkpoint are codes, and codes cannot be extrapolated. Configs do not always say it: MLX
writes the key ``quantization``, and bitsandbytes' checkpoints are published with configs of the original.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from expo_serve.checkpoint.links import is_file
from expo_serve.checkpoint.records import QUANTISED_DTYPES, JsonObject, Operand, TensorRecord
from expo_serve.errors import CheckpointError
from expo_serve.shown import plain

# Files in which quantisers described their work before config.json had a key for it; some still write them.
_QUANTISATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
# What quantisers call the integers that stand for a weight, and what they store beside them: GPTQ and AWQ (qweight,
# qzeros, scales), MLX (weight, scales, biases), bitsandbytes (weight, weight.absmax, weight.quant_state.*, SCB),
# compressed-tensors (weight_packed, weight_scale), MXFP4 (blocks, scales), HQQ (W_q, scale, zero).
_CODES = re.compile(r"(^|[._])(weight|qweight|weight_packed|packed_weight|blocks|W_q)$")
_SCALES = re.compile(
    r"(^|[._])(scales?|weight_scale|scale_inv|weight_scale_inv|absmax|SCB|quant_map|quant_state(\..*)?|q?zeros)$"
)
_ADVICE = "give the unquantised one, and quantise it while loading with vLLM's --quantization"


def refuse_quantised(operand: Operand, config: JsonObject, folder: Path) -> None:
    """Refuse a checkpoint that says that it is quantised.

    Raises:
        CheckpointError: the config or a quantiser's own file says so.
    """
    method = _method(config) or next((name for name in _QUANTISATION_FILES if is_file(folder / name)), None)
    if method:
        raise CheckpointError(
            f"{operand}: the checkpoint is quantised ({method}), so its numbers cannot be extrapolated; {_ADVICE}"
        )


def refuse_quantised_tensors(operand: Operand, records: Iterable[TensorRecord]) -> None:
    """Refuse a checkpoint whose tensors show that it is quantised, whatever its config says.

    Raises:
        CheckpointError: a tensor has a dtype that only quantisers write, or holds integers beside their scales.
    """
    by_module: defaultdict[str, list[TensorRecord]] = defaultdict(list)
    for record in records:
        if record.dtype in QUANTISED_DTYPES:
            raise CheckpointError(
                f"{operand}: tensor {record.name!r} in {record.file} is quantised ({record.dtype}); {_ADVICE}"
            )
        for module in _modules(record.name):
            by_module[module].append(record)
    for module, beside in by_module.items():
        codes = next((record for record in beside if not record.is_float and _is(_CODES, record, module)), None)
        scales = next((record for record in beside if record is not codes and _is(_SCALES, record, module)), None)
        if codes and scales and len(codes.shape) > 1:
            raise CheckpointError(
                f"{operand}: tensor {codes.name!r} in {codes.file} is quantised: it holds integers "
                f"({codes.dtype_and_shape}) beside {scales.name!r}; {_ADVICE}"
            )


def _modules(name: str) -> list[str]:
    """Return the prefixes under which a tensor's codes and scales may stand together.

    ``a.weight.absmax`` belongs to ``a.weight`` and ``a``; ``experts.gate_up_proj_blocks`` to ``experts.gate_up_proj``.
    """
    module, _, last = name.rpartition(".")
    outer = module.removesuffix(".weight") if module.endswith(".weight") else module
    if ".quant_state." in name:
        outer = name.partition(".weight.quant_state.")[0]
    return list(dict.fromkeys([outer, f"{module}.{last.rpartition('_')[0]}"] if "_" in last else [outer]))


def _is(kind: re.Pattern[str], record: TensorRecord, module: str) -> bool:
    return kind.search(record.name.removeprefix(module)) is not None


def _method(config: JsonObject) -> str | None:
    """Return the method of quantisation that the config or a part of it (such as ``text_config``) names."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _CONFIG_KEYS:
            if settings := part.get(key):
                method = settings.get("quant_method") or settings.get("mode") if isinstance(settings, dict) else None
                return plain(method or ("MLX" if key == "quantization" else "unknown"))
    return None
