"""Does vLLM's own loader make of the pair what it makes of the merged checkpoint, how fast, and in how much memory?

Plain vLLM loads the merged checkpoint, expo the pair, in one process and in turn. All parameters and buffers are
compared twice: as they were loaded, and as vLLM left them after its own processing (quantised, packed, padded).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from loadtests.device_check.distance import NONE, Distance, distance
from loadtests.device_check.outcome import Skipped
from loadtests.device_check.setting import Setting
from loadtests.device_check.vllm_models import Models, models
from loadtests.device_check.vllm_worker import Rank, expo_arguments, prepare, worker
from loadtests.results import spread, turns

State = dict[str, torch.Tensor]
_ALONE = Rank()
_SHOWN = 8


@dataclass(frozen=True)
class Kind:
    """One way to load: a model, vLLM's arguments, what is around the load."""

    family: str
    arguments: dict[str, Any] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager[object]] = nullcontext


def _sleep_pool() -> AbstractContextManager[object]:
    """The pool in which a worker loads when its engine may be put to sleep."""
    from vllm.device_allocator.cumem import CuMemAllocator

    opened: AbstractContextManager[object] = CuMemAllocator.get_instance().use_memory_pool("weights")
    return opened


KINDS = {
    "llama": Kind("llama"),
    "fp16": Kind("llama", {"dtype": "float16"}),
    "mixtral": Kind("mixtral"),
    "fp8": Kind("llama", {"quantization": "fp8"}),
    "fp8-per-block": Kind("llama", {"quantization": "fp8_per_block"}),
    "int8": Kind("llama", {"quantization": "int8_per_channel_weight_only"}),
    "mixtral-fp8": Kind("mixtral", {"quantization": "fp8"}),
    "sleep-pool": Kind("large", {"quantization": "fp8"}, _sleep_pool),
    "cpu-offload": Kind("llama", {"cpu_offload_gb": 1}),
    "large": Kind("large"),
}
_ON_GPU_ONLY = ("fp8", "fp8-per-block", "mixtral-fp8", "sleep-pool", "cpu-offload")
"""vLLM's CPU build has no kernels for these, or no such thing."""
_NEEDED = {
    "runai_streamer": ("runai_model_streamer", "humanize"),
    "fastsafetensors": ("fastsafetensors",),
    "instanttensor": ("instanttensor",),
}


def run(setting: Setting, name: str, plain_format: str = "auto") -> dict[str, Any]:
    """One kind of load, plain and by expo."""
    if name in _ON_GPU_ONLY:
        setting.need_cuda(name)
    if plain_format in ("fastsafetensors", "instanttensor"):
        setting.need_cuda(f"the load format {plain_format}")
    if missing := [package for package in _NEEDED.get(plain_format, ()) if find_spec(package) is None]:
        raise Skipped(f"{plain_format} needs what is not installed: {', '.join(missing)}")
    prepare(setting)
    kind = KINDS[name]
    made = models(setting, kind.family)
    states: dict[str, State] = {}
    for way in ("plain", "expo"):
        _, states[way] = load(setting, kind, made, way, plain_format, keeps=True)
    compared = compare(setting, states["plain"], states["expo"])
    return {"plain_format": plain_format, **compared, **_measured(setting, kind, made, plain_format)}


def load(
    setting: Setting,
    kind: Kind,
    made: Models,
    way: str,
    plain_format: str = "auto",
    rank: Rank = _ALONE,
    keeps: bool = False,
) -> tuple[dict[str, Any], State]:
    """One load as a worker does it.

    Args:
        setting: the device.
        kind: what is loaded, and how.
        made: its checkpoints.
        way: plain or expo.
        plain_format: vLLM's load format on the plain side.
        rank: this process's.
        keeps: copy all parameters to the host; the seconds of such a load say nothing.

    Returns:
        Seconds, peak memory, and expo's report; the state by name, empty unless ``keeps``.
    """
    from vllm.model_executor.model_loader import get_model

    mine = expo_arguments(made.base) if way == "expo" else {"load_format": plain_format}
    model = made.aligned if way == "expo" else made.merged
    state: State = {}
    with worker(setting, model, rank, **kind.arguments, **mine) as config, _loaded_kept(state, keeps):
        memory = setting.memory()
        with kind.around():
            built: list[Any] = []
            seconds = setting.seconds(lambda: built.append(get_model(vllm_config=config)))
            peaks = memory.peaks()
    if keeps:
        state.update({f"{name} (processed)": values for name, values in state_of(built[0]).items()})
    report = getattr(built[0], "expo_load_report", None)
    figures = {"seconds": round(seconds, 4), "peaks": peaks, "read_bytes": dict(report.read_bytes) if report else None}
    return figures, state


def state_of(model: torch.nn.Module) -> State:
    """All parameters and buffers, on the host."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: values.detach().cpu().clone() for name, values in tensors.items() if not values.is_meta}


def compare(setting: Setting, plain: State, expo: State) -> dict[str, Any]:
    """Tensor by tensor; a CPU's merge and a GPU's load may lie one step apart, which is told and is not wrong."""
    differing: dict[str, Distance] = {}
    wrong = [f"{name} is there on one side only" for name in sorted(plain.keys() ^ expo.keys())]
    if setting.plants and (name := next(iter(expo), None)):
        expo[name].view(torch.uint8).reshape(-1)[0] ^= 0x80
    for name in plain.keys() & expo.keys():
        one, other = expo[name], plain[name]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            wrong.append(f"{name}: {one.dtype} {tuple(one.shape)}, plain {other.dtype} {tuple(other.shape)}")
            continue
        found = distance(one, other)
        if found.differing:
            differing[name] = found
    whole = sum(differing.values(), NONE)
    wrong += [
        f"{name}: {one.beyond} of {one.values} values are others" for name, one in differing.items() if one.beyond
    ]
    return {
        "tensors": len(plain),
        "differing_tensors": len(differing),
        "differing_values": whole.differing,
        "largest_distance": whole.largest,
        "wrong": wrong[:_SHOWN] if plain else ["vLLM has loaded nothing"],
    }


def _measured(setting: Setting, kind: Kind, made: Models, plain_format: str) -> dict[str, Any]:
    """Both ways in turn, without copies of what was loaded."""
    ways = ("plain", "expo")
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for way in turns(list(ways), setting.rounds):
        found[way].append(load(setting, kind, made, way, plain_format)[0])
    return {
        "seconds": {way: spread([one["seconds"] for one in loads]) for way, loads in found.items()},
        "peaks": {way: loads[-1]["peaks"] for way, loads in found.items()},
        "read_bytes": found["expo"][-1]["read_bytes"],
        "checkpoint_bytes": _nbytes(made.merged),
    }


def _nbytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@contextmanager
def _loaded_kept(state: State, keeps: bool) -> Iterator[None]:
    """Copy what was loaded before vLLM processes it."""
    from vllm.model_executor.model_loader import base_loader

    process = base_loader.process_weights_after_loading

    def keep_and_process(model: torch.nn.Module, *arguments: Any) -> None:
        state.update(state_of(model))
        process(model, *arguments)

    if not keeps:
        yield
        return
    with mock.patch.object(base_loader, "process_weights_after_loading", keep_and_process):
        yield
