"""Load a checkpoint with plain vLLM or with expo, in this process, and say what came of it."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from expo_serve.report import LoadReport
from tests.conformance.family import Family
from tests.inprocess import loaded_state_kept, state_of, vllm_model

PROMPT = (1, 5, 9, 17, 40)
TOKENS = 8
_SMALL_ENGINE: dict[str, Any] = {
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 64,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 2,
    "num_gpu_blocks_override": 32,
}


@dataclass(frozen=True)
class Loaded:
    """What a load gave: every parameter and buffer as raw bytes, expo's report, and greedy tokens if any were asked."""

    state: dict[str, torch.Tensor]
    report: LoadReport | None
    tokens: tuple[int, ...] = ()


Load = Callable[..., Loaded]


def loads_of(family: Family) -> list[Load]:
    """The ways in which a family is loaded: with all its towers, and by an engine that generates."""
    given = {"trust_remote_code": True, **family.engine}
    if family.not_run:
        return [partial(load, **given)]
    if family.multimodal:
        return [partial(load, **given), partial(load_and_generate, language_model_only=True, **given)]
    return [partial(load_and_generate, **given)]


def load(path: Path, **arguments: Any) -> Loaded:
    """Load the model alone, as a worker does."""
    prepare(path)
    with vllm_model(path, **arguments) as model:
        return _describe(model)


def load_and_generate(path: Path, **arguments: Any) -> Loaded:
    """Start an engine, in this process and with no other, and let it go on with a prompt."""
    import vllm

    prepare(path)
    with loaded_state_kept():
        llm = vllm.LLM(str(path), **_SMALL_ENGINE, **arguments)
    try:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": list(PROMPT)}], sampling, use_tqdm=False)
        found: Loaded = llm.apply_model(_describe)[0]
        return replace(found, tokens=tuple(outputs[0].outputs[0].token_ids))
    finally:
        llm.llm_engine.engine_core.shutdown()


def _describe(model: torch.nn.Module) -> Loaded:
    return Loaded(state_of(model), getattr(model, "expo_load_report", None))


def prepare(path: Path) -> None:
    """vLLM looks at a model's class in a process of its own, which takes seconds; here it is imported anyway."""
    from vllm.model_executor.models.registry import ModelRegistry, _RegisteredModel

    for name in json.loads((path / "config.json").read_text())["architectures"]:
        entry = ModelRegistry.models.get(name)
        if entry is not None and not isinstance(entry, _RegisteredModel):
            ModelRegistry.models[name] = _RegisteredModel.from_model_cls(entry.load_model_cls())


@contextmanager
def many_engines() -> Iterator[None]:
    """What many engines in one process need, for as long as they do; nothing here touches how weights are loaded."""
    import vllm.v1.engine.core
    from vllm.platforms import current_platform

    # vLLM replaces its Triton kernels anew for every worker, which takes half a second and fails after some models.
    current_platform.register_triton_kernel_overrides()
    with ExitStack() as stack:
        for owner, name in (
            (torch.accelerator, "empty_cache"),  # raises on a machine without an accelerator
            (vllm.v1.engine.core, "enable_envs_cache"),  # the tests after this one set other variables
            (type(current_platform), "register_triton_kernel_overrides"),
            (gc, "unfreeze"),
        ):
            stack.enter_context(mock.patch.object(owner, name, _do_nothing))
        stack.enter_context(_torchvision_importable())
        # vLLM collects garbage eight times for each engine; what was imported is none.
        gc.collect()
        gc.freeze()
        yield
    gc.unfreeze()


def _do_nothing(*_: object) -> None:
    pass


@contextmanager
def _torchvision_importable() -> Iterator[None]:
    """vLLM's models with images import torchvision at their top, and no build of it fits the CPU build of torch.

    Its Python part does, in a folder of its own (``make setup``), once the operators are declared that its compiled
    part would bring. Loading weights calls none of them.
    """
    operators = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        operators.define(  # type: ignore[no-untyped-call]
            f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    folder = str(Path(sys.prefix) / "vision")
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)  # a process that is started later must not find it
