"""The only package that imports vLLM: thin adapters, which vLLM finds through entry points.

Both functions import lazily, because vLLM loads the entry points in every process, and some processes need neither.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Entry point ``vllm.general_plugins``: register the load format, keep caches apart, show stacks when asked.

    Can be called repeatedly.
    """
    from expo_serve.vllm_plugin.caches import keep_apart
    from expo_serve.vllm_plugin.child_ends import report_child_ends
    from expo_serve.vllm_plugin.loader import register_loader
    from expo_serve.vllm_plugin.stacks import show_stacks_on_demand

    register_loader()
    keep_apart()
    show_stacks_on_demand()
    report_child_ends()


def endpoint_plugin() -> Any:
    """Entry point ``vllm.endpoint_plugins``: return the plugin that adds ``/v1/expo``, the header and the metrics."""
    from expo_serve.vllm_plugin.endpoints import ExpoEndpointPlugin

    return ExpoEndpointPlugin()
