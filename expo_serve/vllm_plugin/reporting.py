"""What one load takes and does, measured from its start to its report."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from expo_serve import memory
from expo_serve.load.counts import Counts
from expo_serve.plan.plan import Plan
from expo_serve.report import LoadReport, public_source
from expo_serve.vllm_plugin import compat
from expo_serve.vllm_plugin.unwritten import made_late


@dataclass
class LoadAccount:
    """One load, from its start to its report."""

    anonymous_before: int
    started: float = field(default_factory=time.perf_counter)
    resolved: float = 0.0
    done_bytes: int = 0
    unfilled: list[str] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    late: list[torch.nn.Module] = field(default_factory=list)
    """Layers whose parameters are not there yet when ``load_weights`` is done."""

    @staticmethod
    def open(model: torch.nn.Module) -> LoadAccount:
        """Begin, with the marks of peak memory set back."""
        memory.reset_peak()
        if device := _cuda_device(model):
            torch.cuda.reset_peak_memory_stats(device)
        return LoadAccount(memory.anonymous_bytes())

    def sort(self, model: torch.nn.Module) -> None:
        """Tell the layers that are loaded from those that vLLM quantises later."""
        modules = list(model.modules())
        self.late = [
            module
            for module in modules
            if made_late(module) and any(part.is_meta for part in module.parameters(recurse=False))
        ]
        self.done_bytes = _parameter_bytes(module for module in modules if module not in self.late)

    def report(self, model: torch.nn.Module, plan: Plan, alpha: float) -> LoadReport:
        """What has been done until now."""
        ended = time.perf_counter()
        device = _cuda_device(model)
        return LoadReport(
            rank=compat.get_current_vllm_config().parallel_config.rank,
            sources={side: public_source(source) for side, source in plan.sources.items()},
            alpha=alpha,
            total_seconds=ended - self.started,
            phase_seconds={"resolve": self.resolved - self.started, "weights": ended - self.resolved},
            read_bytes={side: self.counts.read_bytes[side] for side in plan.sources},
            weight_bytes=self.done_bytes + _parameter_bytes(self.late),
            tensors={str(kind): count for kind, count in self.counts.count().items()},
            alphas=plan.alphas,
            grown_rows=plan.grown,
            copied_unmatched=len(plan.copied_unmatched),
            ignored_base=len(plan.ignored_base),
            unchanged=len(plan.unchanged),
            unfilled=self.unfilled,
            peak_host_memory_bytes=memory.peak_resident_bytes(),
            anonymous_memory_growth_bytes=max(0, memory.anonymous_bytes() - self.anonymous_before),
            peak_device_memory_bytes=torch.cuda.max_memory_allocated(device) if device else None,
        )


def _parameter_bytes(modules: Iterable[torch.nn.Module]) -> int:
    """Size of the parameters that the modules themselves hold in memory, shared ones counted once."""
    own = {id(parameter): parameter for module in modules for parameter in module.parameters(recurse=False)}
    return sum(parameter.nbytes for parameter in own.values() if not parameter.is_meta)


def _cuda_device(model: torch.nn.Module) -> torch.device | None:
    device = next((parameter.device for parameter in model.parameters()), None)
    return device if device is not None and device.type == "cuda" else None
