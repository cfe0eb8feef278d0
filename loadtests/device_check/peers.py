"""How fast are other loaders on the same machine? They load one checkpoint, by their own interface; a pair is two.

What they bring is compared with the file, so that a rate of nothing is no figure.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.session import LoadSession
from expo_serve.plan.plan import Plan
from loadtests.device_check import rates
from loadtests.device_check.outcome import Skipped
from loadtests.device_check.setting import Setting

Tensors = dict[str, torch.Tensor]
_NEEDS = {"runai_model_streamer": ("runai_model_streamer", "humanize")}


def run(setting: Setting, peer: str) -> dict[str, Any]:
    """One peer beside expo and the link, in turn."""
    missing = [name for name in _NEEDS.get(peer, (peer,)) if find_spec(name) is None]
    if missing:
        raise Skipped(f"not installed: {', '.join(missing)}")
    loaders: dict[str, Callable[[Path, torch.device], Tensors]] = {
        "safetensors": _safetensors,
        "fastsafetensors": _fastsafetensors,
        "runai_model_streamer": _runai,
        "instanttensor": _instanttensor,
    }
    load, plan = loaders[peer], rates.pair_plan(setting)
    file = rates.pair(setting) / "aligned" / "model.safetensors"
    wrong = _unlike_file(load(file, setting.device), plan)
    ways = {
        "expo, both sides": rates.Load(setting, plan).way(),
        f"{peer}, one side": rates.Way(lambda: load(file, setting.device), plan.aligned_or_delta.nbytes),
    }
    return {**rates.measured(setting, ways), "peer_loads": "one checkpoint", "wrong": wrong}


def _unlike_file(tensors: Tensors, plan: Plan) -> list[str]:
    """A sentence if a tensor is missing, or the last one has other values than the file."""
    if missing := plan.tensors.keys() - tensors.keys():
        return [f"{len(missing)} tensors are missing, {min(missing)} among them"]
    name = list(plan.tensors)[-1]
    (expected,) = _of_aligned(plan, name)
    return [] if torch.equal(tensors[name].cpu(), expected) else [f"{name} has other values than the file"]


def _of_aligned(plan: Plan, name: str) -> list[torch.Tensor]:
    from dataclasses import replace

    planned = replace(plan.tensors[name], alpha=0.0)
    return [lazy_tensor(planned, LoadSession()).materialize()]


def _safetensors(file: Path, device: torch.device) -> Tensors:
    from safetensors.torch import load_file

    loaded: Tensors = load_file(file, device=str(device))
    return loaded


def _fastsafetensors(file: Path, device: torch.device) -> Tensors:
    from fastsafetensors import fastsafe_open

    with fastsafe_open([str(file)], nogds=True, device=str(device)) as opened:
        return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 - no mapping


def _runai(file: Path, device: torch.device) -> Tensors:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(file)], device="cpu")
        # Its tensors are views of buffers that it uses again: onto the device, or a copy of one's own.
        return {name: tensor.to(device, copy=True) for name, tensor in streamer.get_tensors()}


def _instanttensor(file: Path, device: torch.device) -> Tensors:
    if device.type != "cuda":
        raise Skipped("instanttensor is for NVIDIA GPUs")
    import instanttensor

    with instanttensor.safe_open([str(file)], framework="pt", device=device.index or 0, copy=True) as opened:
        return dict(opened.tensors())
