"""The number rule, written out a second time: what the package must agree with bit for bit."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else ["model.safetensors"]
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def random_bits(name: str, count: int, seed: int = 0, start: int = 0) -> np.ndarray:
    """The 16 random bits of ``count`` elements of a tensor, from element ``start`` on."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    one, two = (int.from_bytes(digest[place : place + 4], "little") for place in (0, 4))
    index = np.arange(start, start + count, dtype=np.uint64)
    pair, mask = index // np.uint64(2), np.uint64(0xFFFFFFFF)
    with np.errstate(over="ignore"):
        word = (pair + np.uint64(one)) & mask
        word = ((word ^ (word >> np.uint64(16))) * np.uint64(0x7FEB352D)) & mask
        word = (word + np.uint64(two) + (pair >> np.uint64(32)) * np.uint64(0x9E3779B9)) & mask
        word = ((word ^ (word >> np.uint64(15))) * np.uint64(0x846CA68B)) & mask
        word ^= word >> np.uint64(16)
    return np.where(index % np.uint64(2), word >> np.uint64(16), word & np.uint64(0xFFFF)).astype(np.int64)


def dithered(values: torch.Tensor, dtype: torch.dtype, random: np.ndarray) -> torch.Tensor:
    """Floor of the size in units of the last place and a random fraction of a unit, in exact fp64 arithmetic."""
    digits, least = {torch.bfloat16: (8, -126), torch.float16: (11, -14)}[dtype]
    exact = values.float().double().numpy()
    _, exponent = np.frexp(exact)  # the size is in [2**(exponent - 1), 2**exponent)
    unit = np.ldexp(1.0, np.maximum(exponent - 1, least) - (digits - 1))
    size = np.floor(np.abs(exact) / unit + random.reshape(exact.shape) / 65536) * unit
    return torch.from_numpy(np.asarray(np.copysign(size, exact))).to(dtype)


def extrapolate(
    base: torch.Tensor | None, aligned: torch.Tensor, alpha: float, name: str | None = None, seed: int = 0
) -> torch.Tensor:
    """lerp on fp32 values, rounded once; at 0 and -1 the bits of one side; new rows are aligned's.

    Rounded to nearest without ``name``, else dithered.
    """
    if base is None or not aligned.is_floating_point() or alpha == 0:
        return aligned.clone()
    result = aligned.clone()
    shared = aligned[: len(base)] if aligned.dim() else aligned
    if alpha == -1:
        values = base.to(aligned.dtype)
    else:
        wide = torch.float64 if torch.float64 in (base.dtype, aligned.dtype) else torch.float32
        exact = torch.lerp(base.to(wide), shared.to(wide), 1 + alpha)
        is_dithered = name is not None and aligned.dtype in (torch.bfloat16, torch.float16)
        random = random_bits(name, exact.numel(), seed) if name is not None and is_dithered else np.zeros(0)
        values = dithered(exact, aligned.dtype, random) if is_dithered else exact.to(aligned.dtype)
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
    rounding: str = "dithered",
) -> dict[str, torch.Tensor]:
    """Every tensor of the extrapolated checkpoint.

    Args:
        base: a folder.
        aligned: a folder.
        alpha: how far.
        base_name: aligned's name of a tensor to base's; what base does not have is taken over.
        alphas: of tensors that get another one.
        rounding: dithered or nearest.
    """
    before, after = read_tensors(base), read_tensors(aligned)
    alphas = alphas or {}
    return {
        name: extrapolate(
            before.get(base_name(name)), tensor, alphas.get(name, alpha), name if rounding == "dithered" else None
        )
        for name, tensor in after.items()
    }


def reference_checkpoint(
    base: Path,
    aligned: Path,
    alpha: float,
    out: Path,
    base_name: Callable[[str], str] = same_name,
    alphas: Mapping[str, float] | None = None,
    rounding: str = "dithered",
) -> Path:
    """Write the extrapolated checkpoint as one plain file, with the aligned side's other files."""
    out.mkdir(parents=True)
    for file in aligned.iterdir():
        if not file.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copy(file, out / file.name)
    tensors = reference_tensors(base, aligned, alpha, base_name, alphas, rounding)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out
