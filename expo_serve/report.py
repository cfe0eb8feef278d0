"""Reports of a load and of a deployment; ``/v1/expo``, the metrics and the log line are all made from them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, PlainSerializer

from expo_serve.config import Source, format_alpha
from expo_serve.version import __version__

SCHEMA_VERSION: Literal[1] = 1
# Serialises 1, not 1.0, as the canonical form of alpha demands.
Alpha = Annotated[float, PlainSerializer(lambda alpha: int(alpha) if alpha == int(alpha) else alpha)]


class PublicSource(BaseModel):
    """A source as clients see it, without its path."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    revision: str | None
    fingerprint: str


class LoadReport(BaseModel):
    """The load of one rank. Durations are in seconds, sizes in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: int = 0
    """Index of the engine (data-parallel rank)."""
    rank: int = 0
    """Rank within the engine (tensor and pipeline parallelism)."""
    sources: dict[str, PublicSource]
    """The sources by operand: base, aligned or delta."""
    alpha: Alpha
    total_seconds: float
    phase_seconds: dict[str, float]
    """``resolve`` (find, check and pair the sources) and ``weights`` (read, combine and copy)."""
    read_bytes: dict[str, int]
    """Bytes requested from storage, by operand."""
    weight_bytes: int
    """Size of the model's parameters on this rank."""
    tensors: dict[str, int]
    """Checkpoint tensors by kind: extrapolated, materialized, copied."""
    alphas: dict[str, int]
    """Number of extrapolated tensors, by alpha."""
    grown_rows: dict[str, int]
    """Number of rows that only aligned has, by tensor."""
    copied_unmatched: int
    ignored_base: int
    unchanged: int = 0
    """Number of tensors that the delta does not name; they are base's at every alpha."""
    unfilled: list[str] = []
    """Parameters that vLLM's code fills from no tensor, with or without expo-serve."""
    peak_host_memory_bytes: int
    """Peak resident size of the worker process during the load."""
    anonymous_memory_growth_bytes: int
    peak_device_memory_bytes: int | None = None
    """None on CPU."""

    def line(self) -> str:
        """Return the report as one line for the log."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.tensors.items())
        read = " + ".join(f"{_megabytes(size)} of {side}" for side, size in self.read_bytes.items())
        phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in self.phase_seconds.items())
        device = self.peak_device_memory_bytes
        return (
            f"expo: loaded with alpha {format_alpha(self.alpha)} in {self.total_seconds:.2f} s ({phases}): "
            f"{kinds} tensors; read {read or 'nothing'}; weights {_megabytes(self.weight_bytes)}; "
            f"peak host memory {_megabytes(self.peak_host_memory_bytes)}, "
            f"anonymous growth {_megabytes(self.anonymous_memory_growth_bytes)}"
            + (f", peak device memory {_megabytes(device)}" if device is not None else "")
        )


class DeploymentReport(BaseModel):
    """The body of ``GET /v1/expo``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    version: str = __version__
    alpha: Alpha
    alpha_rules: list[str]
    served_model_names: list[str]
    sources: dict[str, PublicSource]
    dtype: str
    startup_seconds: float
    ranks: list[LoadReport]


def public_source(source: Source) -> PublicSource:
    """Return a source without its path."""
    return PublicSource(name=source.name, revision=source.revision, fingerprint=source.fingerprint)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
