"""Reporting of one load: its progress while it runs, and the :class:`LoadReport` when it is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from expo_serve import memory
from expo_serve.config import ExpoConfig, format_alpha, parse_alpha
from expo_serve.load.counts import Counts
from expo_serve.measure.sample import Sample
from expo_serve.plan.plan import Plan
from expo_serve.progress import Progress, Reads
from expo_serve.report import LoadReport, public_source
from expo_serve.vllm_plugin import compat
from expo_serve.vllm_plugin.unwritten import is_quantised_late

logger = compat.init_logger("vllm.expo_serve.reporting")


def load_progress(
    plan: Plan, reads: Reads, config: ExpoConfig, *, is_shown: bool, on_tick: Callable[[], None]
) -> Progress:
    """Return the progress of one load; its lines and warnings go to vLLM's logger.

    Args:
        plan: its total counts the bytes of both operands that a single rank would read.
        reads: the load's reads.
        config: the pinned ``on_terminal`` decides between bar and lines; under plain vLLM standard error itself does.
        is_shown: False on all ranks but the first.
        on_tick: called every half second, and at the end.
    """
    progress = Progress(
        "expo: loading weights",
        sum(plan.read_bytes.values()),
        on_terminal=config.pinned.on_terminal if config.pinned else sys.stderr.isatty(),
        is_shown=is_shown,
        say=lambda line: logger.info("%s", line),
        warn=lambda line: logger.warning("expo: %s", line),
        on_tick=on_tick,
    )
    progress.watch(reads)
    return progress


@dataclass
class LoadAccount:
    """Measures one load, from its start to its report."""

    anonymous_before: int
    """Anonymous memory at the start, in bytes."""
    started: float = field(default_factory=time.perf_counter)
    resolved: float = 0.0
    """When the plan was ready (:func:`time.perf_counter`)."""
    done_bytes: int = 0
    """Size of the parameters that ``load_weights`` has filled."""
    unfilled: list[str] = field(default_factory=list)
    """Parameters that vLLM's code fills from no tensor."""
    counts: Counts = field(default_factory=Counts)
    """Tensors and bytes of the load; set once the weights are loaded."""
    sample: Sample | None = None
    """Measured what arrived of alpha; set once the weights are loaded."""
    late: list[torch.nn.Module] = field(default_factory=list)
    """Layers whose parameters do not exist yet when ``load_weights`` returns."""

    @staticmethod
    def open(model: torch.nn.Module) -> LoadAccount:
        """Start measuring, with the peaks of host and device memory reset."""
        memory.reset_peak()
        if device := _cuda_device(model):
            torch.cuda.reset_peak_memory_stats(device)
        return LoadAccount(memory.anonymous_bytes())

    def sort(self, model: torch.nn.Module) -> None:
        """Separate the layers that are loaded now from those that vLLM quantises later."""
        modules = list(model.modules())
        self.late = [
            module
            for module in modules
            if is_quantised_late(module) and any(part.is_meta for part in module.parameters(recurse=False))
        ]
        self.done_bytes = _parameter_bytes(module for module in modules if module not in self.late)

    def report(self, model: torch.nn.Module, plan: Plan, config: ExpoConfig) -> LoadReport:
        """Return the report of what has been done so far."""
        ended = time.perf_counter()
        device = _cuda_device(model)
        return LoadReport(
            rank=compat.get_current_vllm_config().parallel_config.rank,
            sources={side: public_source(source) for side, source in plan.sources.items()},
            alpha=config.alpha,
            rounding=config.rounding,
            rounding_seed=config.rounding_seed,
            **self._effective_alphas(plan, config.alpha),
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

    def _effective_alphas(self, plan: Plan, alpha: float) -> dict[str, Any]:
        if self.sample is None:
            return {}
        found = {text: self.sample.effective_alpha(parse_alpha(text)) for text in plan.alphas}
        mine = found.get(format_alpha(alpha))
        return {"effective_alpha": mine.value if mine else None, "effective_alphas": found}


def _parameter_bytes(modules: Iterable[torch.nn.Module]) -> int:
    """Return the size of the modules' own parameters that are in memory; a shared parameter counts once."""
    own = {id(parameter): parameter for module in modules for parameter in module.parameters(recurse=False)}
    return sum(parameter.nbytes for parameter in own.values() if not parameter.is_meta)


def _cuda_device(model: torch.nn.Module) -> torch.device | None:
    """Return the device of the model; some parameters may be on the meta device, or be offloaded to the host."""
    if not torch.cuda.is_available():
        return None
    devices = [parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"]
    return devices[0] if devices else torch.device("cuda", torch.cuda.current_device())
