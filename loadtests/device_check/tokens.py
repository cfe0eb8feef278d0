"""Does an engine give the same greedy tokens from the pair as plain vLLM from the merged checkpoint?"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from loadtests.device_check.setting import Setting
from loadtests.device_check.vllm_models import models
from loadtests.device_check.vllm_worker import engine_arguments, expo_arguments, prepare

_PROMPTS = [[1, 5, 17, 300], [1, 900, 12, 44, 8, 251], [1, 3]]
_LENGTH = 16
_MEMORY_SHARE = 0.3


def run(setting: Setting) -> dict[str, Any]:
    """The tokens of both, one engine after the other in this process."""
    prepare(setting)
    made = models(setting, "llama")
    plain = _tokens(setting, made.merged)
    expo = _tokens(setting, made.aligned, **expo_arguments(made.base))
    if setting.plants:
        expo[0][0] += 1
    wrong = [f"prompt {index}: {one}, plain {other}" for index, (one, other) in _unequal(expo, plain)]
    return {"tokens": plain, "wrong": wrong if all(plain) else ["plain vLLM gives no tokens"]}


def _unequal(expo: list[list[int]], plain: list[list[int]]) -> list[tuple[int, tuple[list[int], list[int]]]]:
    return [(index, pair) for index, pair in enumerate(zip(expo, plain, strict=True)) if pair[0] != pair[1]]


def _tokens(setting: Setting, model: Path, **arguments: Any) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    share = {"gpu_memory_utilization": _MEMORY_SHARE} if setting.is_cuda else {}
    llm = LLM(model=str(model), **engine_arguments(setting), **share, **arguments)
    sampling = SamplingParams(temperature=0, max_tokens=_LENGTH, ignore_eos=True, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in _PROMPTS], sampling, use_tqdm=False)
    found = [list(answer.outputs[0].token_ids) for answer in answers]
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    if setting.is_cuda:
        torch.cuda.empty_cache()
    return found
