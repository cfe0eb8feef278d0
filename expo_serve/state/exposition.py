"""The state of a command as Prometheus gauges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from expo_serve.state.snapshot import PHASES

_MAX_MESSAGE = 120
_RANK = ("engine", "rank", "source")


def exposition(state: Mapping[str, Any]) -> bytes:
    """Return a snapshot in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Gauges(state))
    return generate_latest(registry)


class _Gauges(Collector):
    """The gauges of one snapshot; what is not known has no sample."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = state

    def collect(self) -> Iterator[GaugeMetricFamily]:
        state = self._state
        yield _labelled(
            "expo_state_phase",
            "Whether the command is in this phase.",
            ("phase",),
            {(phase,): float(phase == state["phase"]) for phase in PHASES},
        )
        yield _labelled(
            "expo_state_phase_duration_seconds",
            "How long a phase took, or has taken so far.",
            ("phase",),
            {(phase,): seconds for phase, seconds in state["phase_seconds"].items()},
        )
        for name, (text, value) in self._plain().items():
            if value is not None:
                yield GaugeMetricFamily(f"expo_state_{name}", text, value=float(value))
        yield from self._ranks()
        if error := state["error"]:
            yield _labelled(
                "expo_state_failed",
                "1 once the start or the server has failed, with the cause.",
                ("reason", "message"),
                {(error["reason"], error["message"][:_MAX_MESSAGE]): 1.0},
            )

    def _plain(self) -> dict[str, tuple[str, float | None]]:
        state, load = self._state, self._state["load"] or {}
        return {
            "ready": ("Whether requests should be sent.", state["ready"]),
            "start_time_seconds": ("Start of the command, in seconds since 1970.", state["start_time_seconds"]),
            "load_bytes_per_second": ("Rate of the load, over all ranks.", load.get("bytes_per_second")),
            "load_remaining_seconds": ("Estimate of what is left of the load.", load.get("seconds_left")),
            "load_stalled_seconds": ("Time in which a rank's load has made no progress.", load.get("stalled_seconds")),
            "engine_silent_seconds": ("Time since the engine last answered.", state["engine"]["silent_seconds"]),
            "engine_hung": ("Whether that is longer than --engine-timeout.", state["engine"]["is_hung"]),
            "open_requests": ("Requests that are being answered.", state["requests"]["open"]),
            "cut_requests": ("Requests that were cut at the end of a drain.", state["requests"]["cut"]),
            "warnings": ("Warnings so far; /state has their texts.", len(state["warnings"])),
        }

    def _ranks(self) -> Iterator[GaugeMetricFamily]:
        ranks = (self._state["load"] or {}).get("ranks", ())
        for size, text in (
            ("done_bytes", "Bytes of a source that a rank has gone through."),
            ("total_bytes", "Bytes of a source that a rank has to go through."),
        ):
            yield _labelled(
                f"expo_state_load_{size}",
                text,
                _RANK,
                {
                    (str(rank["engine"]), str(rank["rank"]), side): source[size]
                    for rank in ranks
                    for side, source in rank["sources"].items()
                },
            )


def _labelled(
    name: str, text: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], float]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for given, value in values.items():
        family.add_metric(given, value)
    return family
