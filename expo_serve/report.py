"""What a load did, and what is deployed. The one source of ``/v1/expo``, the metrics and the log line."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, PlainSerializer

from expo_serve import __version__
from expo_serve.config import Source, format_alpha

SCHEMA_VERSION: Literal[1] = 1
# 1 rather than 1.0: alpha has one text.
Alpha = Annotated[float, PlainSerializer(lambda alpha: int(alpha) if alpha == int(alpha) else alpha)]


class PublicSource(BaseModel):
    """A source as clients see it: no path."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    revision: str | None
    fingerprint: str


class LoadReport(BaseModel):
    """One rank's load. Durations in seconds, sizes in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: int = 0
    """Index of the engine (data-parallel rank)."""
    rank: int = 0
    """Rank within the engine (tensor and pipeline parallel)."""
    sources: dict[str, PublicSource]
    """What this rank read, by side."""
    alpha: Alpha
    total_seconds: float
    phase_seconds: dict[str, float]
    """``resolve`` (find, check, pair) and ``weights`` (read, combine, copy)."""
    read_bytes: dict[str, int]
    """Bytes asked of storage, by side."""
    weight_bytes: int
    """Size of the model's parameters on this rank."""
    tensors: dict[str, int]
    """Checkpoint tensors by kind: extrapolated, materialized, copied."""
    alphas: dict[str, int]
    """How many tensors were extrapolated with which alpha."""
    grown_rows: dict[str, int]
    """Rows that only the aligned side has, by tensor."""
    copied_unmatched: int
    ignored_base: int
    unchanged: int = 0
    """Tensors that the delta does not name: base's at every alpha."""
    unfilled: list[str] = []
    """Parameters that vLLM's code fills from no tensor, with or without expo."""
    peak_host_memory_bytes: int
    """Peak resident size of the worker during the load."""
    anonymous_memory_growth_bytes: int
    peak_device_memory_bytes: int | None = None
    """None on CPU."""

    def line(self) -> str:
        """The report in one line for the log."""
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
    """A source without its path."""
    return PublicSource(name=source.name, revision=source.revision, fingerprint=source.fingerprint)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


class InspectedSource(PublicSource):
    """A source as ``inspect`` found it. ``bytes`` are those of its tensors."""

    path: str
    kind: str | None = None
    """Of a delta: ``packed``, ``lora`` or ``full``."""
    files: int
    tensors: int
    bytes: int
    dtypes: list[str]


class InspectedTensor(BaseModel):
    """One tensor of the plan; ``base_name`` differs from ``name`` where a tied tensor stands in, or
    one side was saved under a prefix."""

    name: str
    shape: list[int]
    dtype: str
    base_name: str | None
    base_dtype: str | None
    kind: Literal["extrapolated", "copied"]
    alpha: Alpha | None
    grown_rows: int


class InspectedMemory(BaseModel):
    """Sizes in bytes. ``fits_host`` compares all ranks' weights with the memory free now."""

    weight_bytes_per_rank: int
    weight_bytes: int
    available_host_bytes: int
    fits_host: bool


class Refusal(BaseModel):
    """Why the pair would not be served: the message, and all of its details."""

    message: str
    details: list[str]


class Inspection(BaseModel):
    """The output of ``expo-serve inspect --json``. With refusals, what could not be found out is empty."""

    schema_version: Literal[1] = SCHEMA_VERSION
    version: str = __version__
    alpha: Alpha
    alpha_rules: list[str]
    served_model_name: str | None = None
    sources: dict[str, InspectedSource]
    tokenizer: str | None = None
    chat_template: str | None = None
    counts: dict[str, int] = {}
    alphas: dict[str, int] = {}
    copied_unmatched: list[str] = []
    ignored_base: list[str] = []
    unchanged: list[str] = []
    """Tensors that the delta does not name."""
    tensor_parallel_size: int = 1
    read_bytes_per_rank: dict[str, int] = {}
    memory: InspectedMemory | None = None
    warnings: list[str] = []
    refusals: list[Refusal]
    tensors: list[InspectedTensor] = []
