"""The list of all cases. Imports no torch: a call's help and a wrong name are answered at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

KINDS = ("pair", "lora", "full", "packed")
ROUNDINGS = ("nearest", "dithered")
PEERS = ("safetensors", "fastsafetensors", "runai_model_streamer", "instanttensor")
STAGES = {1: "torch alone", 2: "vLLM", 3: "two ranks of vLLM"}


@dataclass(frozen=True)
class Case:
    """One process: a module of this package whose ``run`` is called with the options."""

    name: str
    stage: int
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    seconds: int = 600
    """After which it is ended."""


def _all() -> Iterator[Case]:
    yield Case("machine", 1, "machine_facts", seconds=120)
    for kind in KINDS:
        for rounding in ROUNDINGS:
            yield Case(f"bits-{kind}-{rounding}", 1, "bits", {"kind": kind, "rounding": rounding})
    for check in ("behind-sleep", "memcpy-reader", "triton-reader", "streams", "freed"):
        yield Case(f"order-{check}", 1, "order", {"check": check}, seconds=200)
    yield Case("pool", 1, "pool", seconds=200)
    for check in ("nan", "overflow", "pinned", "memory"):
        yield Case(f"errors-{check}", 1, "errors", {"check": check}, seconds=200)
    for what in ("contiguous", "row", "small", "lora", "packed", "cold", "threads", "pieces"):
        yield Case(f"rates-{what}", 1, "rates", {"what": what})
    for peer in PEERS:
        yield Case(f"peers-{peer}", 1, "peers", {"peer": peer})
    for model in VLLM_CASES:
        yield Case(f"vllm-{model}", 2, "vllm_loads", {"name": model}, seconds=900)
    for load_format in ("runai_streamer", "fastsafetensors", "instanttensor"):
        yield Case(f"format-{load_format}", 2, "vllm_loads", {"name": "large", "plain_format": load_format}, 900)
    yield Case("tokens", 2, "tokens", seconds=900)
    for parallel in ("tensor", "expert"):
        yield Case(f"ranks-{parallel}", 3, "two_ranks", {"parallel": parallel}, seconds=600)


VLLM_CASES = (
    "llama",
    "fp16",
    "mixtral",
    "fp8",
    "fp8-per-block",
    "int8",
    "mixtral-fp8",
    "sleep-pool",
    "cpu-offload",
    "large",
)
"""Loads by vLLM; what each is stands in ``vllm_loads``."""
CASES = {case.name: case for case in _all()}


def chosen(stages: list[int] | None, only: list[str] | None) -> list[Case]:
    """The cases that are asked for, in their order; a part of a name stands for all that begin with it.

    Raises:
        ValueError: a name fits no case.
    """
    for part in only or ():
        if not any(name.startswith(part) for name in CASES):
            raise ValueError(f"no case is called {part!r}; there are {', '.join(CASES)}")
    return [
        case
        for case in CASES.values()
        if (not stages or case.stage in stages) and (not only or any(case.name.startswith(part) for part in only))
    ]
