"""Prometheus gauges of a deployment's report, on the registry behind vLLM's /metrics.

With several API servers, ``multiprocess_mode="mostrecent"`` gives one sample without a pid label.
"""

from __future__ import annotations

from functools import partial

from prometheus_client import REGISTRY, CollectorRegistry, Gauge

from expo_serve.report import DeploymentReport, LoadReport

_RANK = ("engine", "rank")
_INFO = (
    "base", "base_revision", "aligned", "aligned_revision", "delta", "delta_revision",
    "dtype", "rounding", "model_name", "version",
)  # fmt: skip


class DeploymentGauges:
    """The gauges of one deployment.

    Args:
        registry: where they are registered, once.

    Raises:
        ValueError: the gauges are already registered.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        gauge = partial(Gauge, registry=registry, multiprocess_mode="mostrecent")
        self._alpha = gauge("expo_alpha", "Alpha of the server's weights.", ("model_name",))
        self._info = gauge("expo_deployment_info", "The deployed sources; the value is always 1.", _INFO)
        self._startup = gauge(
            "expo_startup_duration_seconds", "Time from the start of the command until the engine is ready."
        )
        self._loads = _LoadGauges(gauge)

    def set(self, report: DeploymentReport) -> None:
        """Set the gauges to a report."""
        for name in report.served_model_names:
            self._alpha.labels(name).set(report.alpha)
            self._info.labels(**_info_labels(report, name)).set(1)
        self._startup.set(report.startup_seconds)
        for rank in report.ranks:
            self._loads.set(rank)


def _info_labels(report: DeploymentReport, model_name: str) -> dict[str, str]:
    labels = dict.fromkeys(_INFO, "")
    for side, source in report.sources.items():
        labels[side] = source.name
        labels[f"{side}_revision"] = source.revision or source.fingerprint
    return {
        **labels,
        "dtype": report.dtype,
        "rounding": report.rounding,
        "model_name": model_name,
        "version": report.version,
    }


class _LoadGauges:
    """The gauges that describe the load of each rank."""

    def __init__(self, gauge: partial[Gauge]) -> None:
        self.total = gauge("expo_load_total_duration_seconds", "Duration of the whole load.", _RANK)
        self.phase = gauge(
            "expo_load_phase_duration_seconds",
            "Duration of one phase: resolve (find, check, pair) or weights (read, combine, copy).",
            (*_RANK, "phase"),
        )
        self.read = gauge("expo_load_read_bytes", "Bytes requested from storage, by source.", (*_RANK, "source"))
        self.weights = gauge("expo_load_weight_bytes", "Size of the model's parameters on this rank.", _RANK)
        self.tensors = gauge(
            "expo_load_tensors",
            "Checkpoint tensors: extrapolated (combined straight into the parameter), materialized "
            "(combined first, since the model asked for values) or copied.",
            (*_RANK, "kind"),
        )
        self.peak_host = gauge(
            "expo_load_peak_host_memory_bytes", "Peak resident size of the worker during the load.", _RANK
        )
        self.anonymous = gauge(
            "expo_load_anonymous_memory_growth_bytes", "Growth of the worker's anonymous memory.", _RANK
        )
        self.make_effective_alpha = partial(
            gauge, "expo_effective_alpha", "Alpha as it is in the rank's weights after rounding, by a sample.", _RANK
        )
        self.effective_alpha: Gauge | None = None
        self.make_peak_device = partial(
            gauge, "expo_load_peak_device_memory_bytes", "Peak device memory during the load.", _RANK
        )
        self.peak_device: Gauge | None = None

    def set(self, report: LoadReport) -> None:
        """Set the gauges to the report of one rank."""
        rank = (str(report.engine), str(report.rank))
        self.total.labels(*rank).set(report.total_seconds)
        self.weights.labels(*rank).set(report.weight_bytes)
        self.peak_host.labels(*rank).set(report.peak_host_memory_bytes)
        self.anonymous.labels(*rank).set(report.anonymous_memory_growth_bytes)
        for gauge, values in (
            (self.phase, report.phase_seconds), (self.read, report.read_bytes), (self.tensors, report.tensors),
        ):  # fmt: skip
            for key, value in values.items():
                gauge.labels(*rank, key).set(value)
        if report.effective_alpha is None and self.effective_alpha:
            self.effective_alpha.remove(*rank)
        elif report.effective_alpha is not None:
            self.effective_alpha = self.effective_alpha or self.make_effective_alpha()
            self.effective_alpha.labels(*rank).set(report.effective_alpha)
        if report.peak_device_memory_bytes is not None:
            self.peak_device = self.peak_device or self.make_peak_device()
            self.peak_device.labels(*rank).set(report.peak_device_memory_bytes)
