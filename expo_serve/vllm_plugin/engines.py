"""Calls to vLLM's engines from its API server."""

from __future__ import annotations

from typing import Any

from expo_serve.errors import CompatError


async def call_engines(engine_client: Any, utility: str, *arguments: Any) -> list[Any]:
    """Call a utility of all engines; returns their answers in the order of the engines.

    The client itself asks one engine only.

    Raises:
        CompatError: this vLLM's client cannot ask every engine.
    """
    core = engine_client.engine_core
    if hasattr(core, "call_utility_all_async"):
        return list(await core.call_utility_all_async(utility, *arguments))
    if engine_client.vllm_config.parallel_config.data_parallel_size > 1:
        raise CompatError("this vLLM's engine client has no call_utility_all_async: not every engine can be asked")
    return [await core.call_utility_async(utility, *arguments)]


async def call_ranks(engine_client: Any, method: str, *arguments: Any) -> dict[int, list[Any]]:
    """Call a method of the worker extension on all ranks of all engines; returns the ranks' answers by engine."""
    core = engine_client.engine_core
    answers = await call_engines(engine_client, "collective_rpc", method, None, arguments, None)
    if not hasattr(core, "call_utility_all_async"):
        return {0: answers[0]}
    engines = [int.from_bytes(identity, "little") for identity in core.core_engines]
    return dict(zip(engines, answers, strict=True))
