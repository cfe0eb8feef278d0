"""The result of ``expo-serve inspect``; ``--json`` prints it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from expo_serve.config import Method
from expo_serve.measure.measurement import Measurement
from expo_serve.report import SCHEMA_VERSION, Alpha, PublicSource
from expo_serve.version import __version__


class InspectedSource(PublicSource):
    """A source as it was found. ``bytes`` is the size of its tensors."""

    path: str
    kind: str | None = None
    """Format of a delta: ``packed``, ``lora`` or ``full``; None for a checkpoint."""
    files: int
    tensors: int
    bytes: int
    dtypes: list[str]


class InspectedTensor(BaseModel):
    """One tensor of the plan. ``base_name`` differs from ``name`` if a tied tensor replaces it, or if one checkpoint
    was saved with a prefix."""

    name: str
    shape: list[int]
    dtype: str
    base_name: str | None
    base_dtype: str | None
    kind: Literal["extrapolated", "copied"]
    alpha: Alpha | None
    grown_rows: int


class InspectedMemory(BaseModel):
    """Sizes in bytes. ``fits_host`` compares the weights of all ranks with the memory that is available now."""

    weight_bytes_per_rank: int
    weight_bytes: int
    available_host_bytes: int
    fits_host: bool


class Refusal(BaseModel):
    """One reason why the sources would not be served: the message and all of its details."""

    message: str
    details: list[str]


class Inspection(BaseModel):
    """The whole result. After a refusal, the fields that could not be determined are empty."""

    schema_version: Literal[1] = SCHEMA_VERSION
    version: str = __version__
    alpha: Alpha
    alpha_rules: list[str]
    allowed: list[str] = []
    """Doubts that the user allows."""
    rounding: Method
    rounding_seed: int
    served_model_name: str | None = None
    sources: dict[str, InspectedSource]
    tokenizer: str | None = None
    chat_template: str | None = None
    counts: dict[str, int] = {}
    alphas: dict[str, int] = {}
    copied_unmatched: list[str] = []
    ignored_base: list[str] = []
    unchanged: list[str] = []
    """Tensors that the delta does not name; they are base's at every alpha."""
    tensor_parallel_size: int = 1
    read_bytes_per_rank: dict[str, int] = {}
    memory: InspectedMemory | None = None
    measurement: Measurement | None = None
    """What the values say; only with ``--measure``."""
    warnings: list[str] = []
    refusals: list[Refusal]
    tensors: list[InspectedTensor] = []
