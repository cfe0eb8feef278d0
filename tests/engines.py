"""Real engines, one after another in one process of their own: two seconds each instead of thirty."""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from tests.children import ask, asked, reply

MAX_TOKENS = 8
PROMPTS = [[5, 6, 7, 8, 9], [9, 100, 200], [1, 42]]


def run_engines(
    runs: list[dict[str, Any]],
    prompts: Sequence[Sequence[int]] = PROMPTS,
    max_tokens: int = MAX_TOKENS,
    **environment: str,
) -> list[dict[str, Any]]:
    """Run engines in another process.

    Args:
        runs: for each ``llm``, the arguments of ``vllm.LLM``, and ``lora``, the folder of an adapter that the prompts
            are asked with a second time, or ``then``, alphas that are loaded one after another before anything else,
            with answers in between.
        prompts: token ids.
        max_tokens: of each greedy answer.
        environment: more variables.

    Returns:
        For each run ``hashes``, ``computed`` (:func:`tests.in_place.computed`) and ``reports`` of its ranks, and
        ``tokens`` of the prompts; with data parallelism the
        tokens only, one engine after the other.

    Raises:
        AssertionError: one failed; the end of the output is in the message.
    """
    answers: list[dict[str, Any]] = ask(
        __name__,
        {"runs": runs, "prompts": prompts, "max_tokens": max_tokens},
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
        **environment,
    )
    return answers


def read_report(model: torch.nn.Module) -> dict[str, Any] | None:
    """Expo's report of one rank; runs in a worker."""
    report = getattr(model, "expo_load_report", None)
    return report.model_dump(mode="json") if report else None


def _run(
    llm: dict[str, Any],
    lora: str | None,
    prompts: list[list[int]],
    sampling: dict[str, Any],
    then: Sequence[float] = (),
) -> dict[str, Any]:
    import vllm
    from vllm.lora.request import LoRARequest

    # The workers find the functions by their modules' names, which __main__ is not for them.
    from tests.engines import read_report
    from tests.in_place import computed
    from tests.inprocess import hash_state, loaded_state_kept

    with loaded_state_kept():
        engine = vllm.LLM(**{"max_model_len": 64, "skip_tokenizer_init": True, **llm})
    requests: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    for alpha in then:
        engine.generate(requests, vllm.SamplingParams(**sampling), use_tqdm=False)
        engine.collective_rpc("expo_load_alpha", args=(alpha,))
        assert engine.reset_prefix_cache()
    tokens = []
    for adapter in [None, LoRARequest("adapter", 1, lora)] if lora else [None]:
        outputs = engine.generate(requests, vllm.SamplingParams(**sampling), use_tqdm=False, lora_request=adapter)
        tokens += [list(output.outputs[0].token_ids) for output in outputs]
    answer = {
        "hashes": engine.apply_model(hash_state),
        "computed": engine.apply_model(computed),
        "reports": engine.apply_model(read_report),
        "tokens": tokens,
    }
    engine.llm_engine.engine_core.shutdown()
    return answer


async def _run_data_parallel(llm: dict[str, Any], prompts: list[list[int]], sampling: dict[str, Any]) -> dict[str, Any]:
    """``vllm.LLM`` drives one engine only; the asynchronous client drives all, and can ask a given one."""
    import vllm
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(
        vllm.AsyncEngineArgs(**{"max_model_len": 64, "skip_tokenizer_init": True, **llm})
    )
    tokens = []
    try:
        for rank in range(llm["data_parallel_size"]):
            for prompt in prompts:
                request: Any = {"prompt_token_ids": prompt}
                params, name = vllm.SamplingParams(**sampling), f"{rank} {prompt}"
                async for output in engine.generate(request, params, name, data_parallel_rank=rank):
                    last = output
                tokens.append(list(last.outputs[0].token_ids))
    finally:
        engine.shutdown()
    return {"tokens": tokens}


def _clean_up() -> None:
    """Leave no trace of an engine for the next one."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    torch.accelerator.empty_cache = lambda: None  # raises on a machine without an accelerator
    cleanup_dist_env_and_memory()


def _main(runs: list[dict[str, Any]], prompts: list[list[int]], max_tokens: int) -> None:
    sampling = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "detokenize": False}
    answers = []
    for run in runs:
        started = time.monotonic()
        if "data_parallel_size" in run["llm"]:
            answers.append(asyncio.run(_run_data_parallel(run["llm"], prompts, sampling)))
        else:
            answers.append(_run(run["llm"], run.get("lora"), prompts, sampling, run.get("then", ())))
        _clean_up()
        print(f"took {time.monotonic() - started:.1f} s", file=sys.stderr)
    reply(answers)


if __name__ == "__main__":
    _main(**asked())
