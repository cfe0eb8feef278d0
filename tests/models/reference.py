"""The number rule, written out a second time: what the package must agree with bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else ["model.safetensors"]
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def extrapolate(base: torch.Tensor | None, aligned: torch.Tensor, alpha: float) -> torch.Tensor:
    """lerp on fp32 values, rounded once; at 0 and -1 the bits of one side; new rows are aligned's."""
    if base is None or not aligned.is_floating_point() or alpha == 0:
        return aligned.clone()
    result = aligned.clone()
    shared = aligned[: len(base)] if aligned.dim() else aligned
    if alpha == -1:
        values = base.to(aligned.dtype)
    else:
        wide = torch.float64 if torch.float64 in (base.dtype, aligned.dtype) else torch.float32
        values = torch.lerp(base.to(wide), shared.to(wide), 1 + alpha).to(aligned.dtype)
    if aligned.dim():
        result[: len(base)] = values
        return result
    return values


def same_name(name: str) -> str:
    """What base calls a tensor of aligned, most often."""
    return name


def reference_tensors(
    base: Path,
    aligned: Path,
    alpha: float,
    base_name: Callable[[str], str] = same_name,
    alphas: Mapping[str, float] | None = None,
) -> dict[str, torch.Tensor]:
    """Every tensor of the extrapolated checkpoint.

    Args:
        base: a folder.
        aligned: a folder.
        alpha: how far.
        base_name: aligned's name of a tensor to base's; what base does not have is taken over.
        alphas: of tensors that get another one.
    """
    before, after = read_tensors(base), read_tensors(aligned)
    alphas = alphas or {}
    return {
        name: extrapolate(before.get(base_name(name)), tensor, alphas.get(name, alpha))
        for name, tensor in after.items()
    }


def reference_checkpoint(
    base: Path,
    aligned: Path,
    alpha: float,
    out: Path,
    base_name: Callable[[str], str] = same_name,
    alphas: Mapping[str, float] | None = None,
) -> Path:
    """Write the extrapolated checkpoint as one plain file, with the aligned side's other files."""
    out.mkdir(parents=True)
    for file in aligned.iterdir():
        if not file.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copy(file, out / file.name)
    tensors = reference_tensors(base, aligned, alpha, base_name, alphas)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out
