"""The checkpoints and deltas that are checked: written by hand, without safetensors and transformers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from expo_serve.checkpoint.folder import open_checkpoint
from expo_serve.checkpoint.records import Operand
from expo_serve.config import ExpoConfig, Method, Source
from expo_serve.plan.pair import plan_pair
from expo_serve.plan.plan import Plan
from expo_serve.plan.prepare import prepare

Shape = tuple[int, ...]
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
_LORA = {"peft_type": "LORA", "base_model_name_or_path": "base"}


def write_checkpoint(folder: Path, tensors: Mapping[str, torch.Tensor], **config: object) -> Path:
    """Write a checkpoint of one file, with a config of a Llama."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    return write_large(folder, shapes, dtypes, lambda name: tensors[name], **config)


def write_large(
    folder: Path,
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, torch.dtype],
    values: Callable[[str], torch.Tensor],
    **config: object,
) -> Path:
    """Write a checkpoint whose tensors are made one by one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**_CONFIG, **config}))
    write_tensors(folder / "model.safetensors", shapes, dtypes, values)
    return folder


def write_tensors(
    file: Path,
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, torch.dtype],
    values: Callable[[str], torch.Tensor],
) -> None:
    """Write one file: a length, a header in JSON, and the values."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": NAMES[dtypes[name]], "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        for name in shapes:
            values(name).contiguous().reshape(-1).view(torch.uint8).numpy().tofile(out)


def write_adapter(folder: Path, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Path:
    """Write a LoRA adapter; ``factors`` are A and B of each weight, by its name."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, (a, b) in factors.items():
        place = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"] = a, b
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    write_tensors(folder / "adapter_model.safetensors", shapes, dtypes, lambda name: tensors[name])
    rank = next(iter(factors.values()))[0].shape[0]
    (folder / "adapter_config.json").write_text(json.dumps({**_LORA, "r": rank, "lora_alpha": 2 * rank}))
    return folder


def write_packed(base: Path, aligned: Path, folder: Path) -> Path:
    """Pack the difference of two checkpoints, as ``expo-serve delta create`` does."""
    from expo_serve.progress import Progress
    from expo_serve.write.packed import write_packed_delta

    sides: tuple[tuple[Operand, Path], ...] = (("base", base), ("aligned", aligned))
    opened = [open_checkpoint(side, Source(name=side, path=str(path))) for side, path in sides]
    plan = plan_pair(opened[0], opened[1], ExpoConfig(base=str(base), aligned=str(aligned), alpha=0))
    folder.mkdir(parents=True)
    shutil.copy(aligned / "config.json", folder)
    with Progress("delta", plan.weight_bytes, on_terminal=False, is_shown=False) as progress:
        write_packed_delta(plan, folder, progress)
    return folder


def plan(base: Path, beside: Path, alpha: float = 0.5, rounding: Method = "nearest") -> Plan:
    """The plan of two folders; the second is called ``aligned`` or ``delta``, which says what it is."""
    sources = {"base": str(base), beside.name: str(beside)}
    return prepare(ExpoConfig.model_validate({**sources, "alpha": alpha, "rounding": rounding}))


def numbers(shape: Shape, seed: int, spread: float = 1.0) -> torch.Tensor:
    """Random numbers in fp32, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder that the first case makes and others find; a case that was cut leaves nothing behind."""
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.rename(folder)
    return folder
