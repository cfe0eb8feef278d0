"""The only room that imports vLLM: thin adapters, found by vLLM through entry points.

Both functions import inside: vLLM loads the entry points in every process, some of which need neither.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Entry point ``vllm.general_plugins``: make the load format ``expo`` known. Safe to call again."""
    from expo_serve.vllm_plugin.loader import register_loader

    register_loader()


def endpoint_plugin() -> Any:
    """Entry point ``vllm.endpoint_plugins``: the plugin that adds ``/v1/expo``, header and metrics."""
    from expo_serve.vllm_plugin.endpoints import ExpoEndpointPlugin

    return ExpoEndpointPlugin()
