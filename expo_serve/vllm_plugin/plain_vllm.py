"""Support for plain vLLM, without the command: which source the model is, and whether its config is right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expo_serve.checkpoint.source import HubAccess
from expo_serve.config import ExpoConfig
from expo_serve.errors import ConfigError, UsageError
from expo_serve.plan.delta import format_of
from expo_serve.plan.packed import PackedDelta
from expo_serve.plan.plan import Plan
from expo_serve.plan.prepare import locate

_EXTRA = "--model-loader-extra-config"
# Keys that tell where a config comes from, or that vLLM gets by its own flags.
_GRPC = "a gRPC server has no /v1/expo, no drain and no check of keys and alpha"
_OTHER_FRONT_ENDS = {
    "grpc": _GRPC,
    "grpc_port": _GRPC,
    "data_parallel_multi_port_external_lb": "its supervisor takes a server that drains for a dead one, and ends all",
}
_IGNORED_KEYS = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"})


def with_model(config: ExpoConfig, model_config: Any, hub: HubAccess) -> ExpoConfig:
    """Return the configuration with vLLM's model as base if there is a delta, else as aligned or packed delta.

    Raises:
        ConfigError: the configuration names another source in the model's place.
        SourceError: the model cannot be found.
    """
    model, revision = model_config.model, model_config.revision
    if config.delta is not None:
        _check_same("base", config.base, model)
        return config.model_copy(update={"base": model, "base_revision": config.base_revision or revision})
    _check_same("aligned", config.aligned, model)
    revision = config.aligned_revision or revision
    aligned = config.model_copy(update={"aligned": model, "aligned_revision": revision})
    if format_of(Path(locate("aligned", aligned, hub).path)) is PackedDelta:
        return config.model_copy(
            update={"delta": model, "delta_revision": revision, "aligned": None, "aligned_revision": None}
        )
    return aligned


def _check_same(side: str, given: str | None, model: str) -> None:
    if given not in (None, model):
        raise ConfigError(
            f"{_EXTRA}: expected no {side}, or vLLM's model itself ({model!r}), found {given!r}; leave the key out"
        )


def check_config(plan: Plan, model_config: Any) -> None:
    """Refuse a model whose config is not that of the result. The command sets the config; plain vLLM's user has to.

    Raises:
        ConfigError: the config differs; the message names a way that works.
    """
    if isinstance(plan.aligned_or_delta, PackedDelta) and not _is_at(model_config.model, plan):
        theirs, ours = plan.base.config, plan.aligned_or_delta.config
        if differing := sorted(key for key in {*theirs, *ours} - _IGNORED_KEYS if theirs.get(key) != ours.get(key)):
            raise ConfigError(
                f"{_EXTRA}: the delta's config differs from base's ({', '.join(differing[:3])}): give the delta's "
                'folder as the model and {"base": ..., "alpha": ...} here'
            )
    for key, wanted in _flat(plan.overrides).items():
        found = getattr(model_config.hf_text_config, key, getattr(model_config.hf_config, key, None))
        if found != wanted:
            raise ConfigError(
                f"{_EXTRA}: with this delta the model's config must have {key} {wanted}, found {found}: give "
                f"--hf-overrides '{{\"{key}\": {str(wanted).lower()}}}', or use expo-serve --base ... --delta ..."
            )


def refuse_other_front_ends(args: Any) -> None:
    """Refuse flags that start another front end than vLLM's API server, or another supervisor than expo-serve's.

    Args:
        args: vLLM's arguments.

    Raises:
        UsageError: names the flag.
    """
    for name, reason in _OTHER_FRONT_ENDS.items():
        if getattr(args, name, None) not in (None, False):
            raise UsageError(f"--{name.replace('_', '-')}: {reason}; leave it out")


def refuse_elastic_experts(is_elastic: bool) -> None:
    """Refuse to serve with a number of ranks that changes: vLLM's new ranks take no load format with an extra config.

    Args:
        is_elastic: vLLM's ``enable_elastic_ep``.

    Raises:
        ConfigError: it is set.
    """
    if is_elastic:
        raise ConfigError(
            "--enable-elastic-ep: ranks that vLLM adds later cannot load with expo-serve (vLLM gives them its dummy "
            "load format, which refuses an extra config); start another deployment with more ranks instead"
        )


def _is_at(model: str, plan: Plan) -> bool:
    """Return whether the model that vLLM was given is the delta."""
    is_named = plan.model.revision is not None and model == plan.model.name
    return is_named or Path(model).resolve() == Path(plan.model.path)


def _flat(overrides: Mapping[str, Any]) -> dict[str, Any]:
    nested = [value for value in overrides.values() if isinstance(value, dict)]
    return {key: value for part in (overrides, *nested) for key, value in part.items() if not isinstance(value, dict)}
