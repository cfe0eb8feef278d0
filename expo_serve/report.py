"""Reports of a load and of a deployment; ``/v1/expo``, the metrics and the log line are all made from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, PlainSerializer

from expo_serve.config import Method, Source, format_alpha, parse_alpha
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


class EffectiveAlpha(BaseModel):
    """How much of alpha is in the weights after rounding: docs/number-rule.md#effective-alpha."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float | None
    """``sum((result - aligned) * step) / sum(step ** 2)``; None where nothing changed."""
    standard_error: float = 0.0
    """Of ``value``, where that comes from a sample."""
    step_squares: float = 0.0
    """``sum(step ** 2)``, by which the values of several ranks are weighted."""

    def misses(self, alpha: float) -> bool:
        """Return whether it is off by more than 10%, and by more than a sample explains."""
        allowed = 0.1 * abs(alpha) + 3 * self.standard_error
        return self.value is not None and abs(self.value - alpha) > allowed


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
    rounding: Method = "nearest"
    rounding_seed: int = 0
    effective_alpha: float | None = None
    """Of the tensors under ``alpha``, measured on a sample; None where nothing changed."""
    effective_alphas: dict[str, EffectiveAlpha] = {}
    """The same for each alpha that rules give, by its canonical form."""
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
            f"{self._effective()}, rounding {self.rounding}; "
            f"{kinds} tensors; read {read or 'nothing'}; weights {_megabytes(self.weight_bytes)}; "
            f"peak host memory {_megabytes(self.peak_host_memory_bytes)}, "
            f"anonymous growth {_megabytes(self.anonymous_memory_growth_bytes)}"
            + (f", peak device memory {_megabytes(device)}" if device is not None else "")
        )

    def _effective(self) -> str:
        return "nothing changed" if self.effective_alpha is None else f"effective alpha {self.effective_alpha:.4g}"

    def warnings(self) -> list[str]:
        """Return a line for each alpha that does not arrive."""
        return alpha_warnings(self.effective_alphas, self.rounding)


_WHY_MISSED: dict[Method, str] = {
    "nearest": "rounding to nearest swallows or doubles steps as small as these; give --rounding dithered",
    "dithered": "too few values change for random rounding to average out; expo-serve inspect --measure shows which, "
    "and another --rounding-seed gives another draw",
}


def alpha_warnings(effective: Mapping[str, EffectiveAlpha], rounding: Method) -> list[str]:
    """Return a line for each alpha, in its canonical form, that does not arrive."""
    return [
        f"effective alpha is {found.value:.3g} instead of {alpha}: {_WHY_MISSED[rounding]}"
        for alpha, found in effective.items()
        if found.misses(parse_alpha(alpha))
    ]


class DeploymentReport(BaseModel):
    """The body of ``GET /v1/expo``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    version: str = __version__
    alpha: Alpha
    alpha_rules: list[str]
    allowed: list[str] = []
    """Doubts about the sources that the user allowed: docs/sources.md#doubts."""
    rounding: Method
    rounding_seed: int
    effective_alpha: float | None
    """Of the tensors under ``alpha``, over all ranks; None where nothing changed."""
    deployment_id: str
    """Digest of the sources, alpha, rules and rounding: caches of two deployments are kept apart by it."""
    served_model_names: list[str]
    sources: dict[str, PublicSource]
    dtype: str
    startup_seconds: float
    ranks: list[LoadReport]


def combined_effective_alpha(alpha: float, ranks: Iterable[LoadReport]) -> float | None:
    """Return the effective alpha over several ranks, each weighted by the size of its step."""
    found = [rank.effective_alphas.get(format_alpha(alpha)) for rank in ranks]
    known = [one for one in found if one and one.value is not None]
    total = sum(one.step_squares for one in known)
    if not total:
        return known[0].value if known else None
    return sum(one.step_squares * (one.value or 0.0) for one in known) / total


def public_source(source: Source) -> PublicSource:
    """Return a source without its path."""
    return PublicSource(name=source.name, revision=source.revision, fingerprint=source.fingerprint)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
