"""What was tried together with extrapolating: the flags, what was compared with plain vLLM, and how.

The tests take their flags from here and say which combinations they cover; that nothing is missing is a test too
(``tests/vllm_plugin/test_combinations.py``), so that a table made of this cannot drift.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Compared = Literal["bits", "tokens", "bits, tokens"]
Kind = Literal["bits", "tokens"]
Function = TypeVar("Function", bound=Callable[..., object])


@dataclass(frozen=True)
class Combination:
    """One way of running vLLM. ``bits`` are those of every parameter and buffer, ``tokens`` those of greedy answers,
    always next to plain vLLM 0.32 on the merged checkpoint, on CPU."""

    name: str
    flags: tuple[str, ...]
    """As ``vllm serve`` takes them; ``...`` stands for a path."""
    compared: Compared
    how: str

    @property
    def example(self) -> str:
        """The flags in one line."""
        return " ".join(f"'{flag}'" if " " in flag else flag for flag in self.flags)

    def arguments(self, **paths: str) -> dict[str, Any]:
        """The flags as arguments of ``vllm.LLM``; ``paths`` take the place of what the flags leave open."""
        arguments: dict[str, Any] = {}
        for flag in self.flags:
            if flag.startswith("--"):
                name = flag.removeprefix("--").replace("-", "_")
                arguments[name] = True
            else:
                arguments[name] = _value(flag)
        for key, path in paths.items():
            outer, _, inner = key.partition("__")
            if inner:
                arguments[outer] = {**arguments[outer], inner: path}
            else:
                arguments[outer] = path
        return arguments


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _speculative(**settings: Any) -> tuple[str, str]:
    return "--speculative-config", json.dumps(settings)


COMBINATIONS = (
    Combination("tensor parallel", ("--tensor-parallel-size", "2"), "bits, tokens", "each rank; it reads its share"),
    Combination(
        "pipeline parallel",
        ("--pipeline-parallel-size", "2", "--compilation-config", '{"mode": 2, "backend": "eager"}'),
        "bits, tokens",
        "each rank; it reads its layers",
    ),
    Combination("data parallel", ("--data-parallel-size", "2"), "tokens", "each engine"),
    Combination(
        "expert parallel",
        ("--tensor-parallel-size", "2", "--enable-expert-parallel"),
        "bits",
        "each rank; it reads its experts; vLLM's CPU kernel for experts crashes",
    ),
    Combination(
        "expert parallel, filtered by name",
        ("--tensor-parallel-size", "2", "--enable-expert-parallel", "--enable-ep-weight-filter"),
        "bits",
        "each rank; foreign experts are not even named",
    ),
    Combination("another dtype", ("--dtype", "float32"), "bits, tokens", "rounded as a checkpoint's weights are"),
    Combination("quantised: fp8_per_channel", ("--quantization", "fp8_per_channel"), "bits, tokens", "dense model"),
    Combination(
        "quantised: int8_per_channel_weight_only",
        ("--quantization", "int8_per_channel_weight_only"),
        "bits",
        "dense model; on CPU vLLM has no kernel for experts",
    ),
    Combination(
        "quantised: nvfp4_per_token", ("--quantization", "nvfp4_per_token"), "bits", "dense model; experts need a GPU"
    ),
    Combination(
        "quantised: fp8, fp8_per_tensor",
        ("--quantization", "fp8"),
        "bits",
        "dense model; the CPU build lacks the kernel, so both sides round in torch",
    ),
    Combination(
        "draft model",
        _speculative(method="draft_model", model="...", num_speculative_tokens=2),
        "bits, tokens",
        "the draft loads as it is",
    ),
    Combination(
        "MTP head in the checkpoint",
        _speculative(method="mtp", num_speculative_tokens=1),
        "bits, tokens",
        "extrapolated like all else; copied, when only aligned has it",
    ),
    Combination(
        "EAGLE head",
        _speculative(method="eagle", model="...", num_speculative_tokens=2),
        "bits, tokens",
        "the head loads as it is",
    ),
    Combination(
        "runtime LoRA",
        ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8"),
        "bits, tokens",
        "with and without the adapter",
    ),
    Combination("multimodal", (), "bits", "BLIP-2: tower, connector and language model are extrapolated"),
    Combination("encoder only", ("--mm-encoder-only",), "bits", "the language model's shards are not opened"),
    Combination("language model only", ("--language-model-only",), "bits", "the tower is left out"),
    Combination("further weights from elsewhere", (), "bits", "a model's secondary_weights load as they are"),
    Combination("files chosen by the model", (), "bits", "allow_patterns_overrides"),
    Combination("shards that the model does not use", (), "bits", "is_unused_checkpoint_weight"),
    Combination("another process with the config alone", (), "bits", "as Ray and multi-node workers load"),
    Combination("weights loaded again", (), "bits", "one loader twice, and vLLM's reload_weights in place"),
)
"""Each name once."""

_covered: defaultdict[str, set[Kind]] = defaultdict(set)


def combination(name: str) -> Combination:
    """The combination of this name."""
    return next(one for one in COMBINATIONS if one.name == name)


def covers(name: str, *kinds: Kind) -> Callable[[Function], Function]:
    """Say that a test compares these for the combination of this name."""
    combination(name)

    def note(function: Function) -> Function:
        _covered[name].update(kinds)
        return function

    return note


def covered() -> dict[str, str]:
    """What the tests imported so far compare, by name."""
    return {name: ", ".join(sorted(kinds)) for name, kinds in _covered.items()}
