"""Keeps apart what vLLM stores outside of an engine: KV blocks and encoder outputs of deployments with one model path.

External KV stores name the model by ``model_config.model``, which is the same for every alpha. Connectors are given a
copy of vLLM's configuration in which that name ends with the deployment's digest, so that each store's own keys differ
by it; all else in vLLM sees the plain name. Stores whose keys hold no model, or that are not known, are refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from functools import wraps
from typing import Any

from expo_serve.config import deployment_id, parse_config
from expo_serve.errors import ConfigError
from expo_serve.vllm_plugin import compat

KEYED_BY_MODEL = frozenset({
    "OffloadingConnector", "LMCacheConnectorV1", "LMCacheMPConnector", "MooncakeStoreConnector",
    "NixlConnector", "NixlPullConnector", "NixlPushConnector", "ECCPUConnector",
})  # fmt: skip
"""Connectors with the model in their keys, or in the handshake with their peers."""
OF_ONE_ENGINE = frozenset({"SimpleCPUOffloadConnector", "HiSparseConnector", "DecodeBenchConnector"})
"""Connectors that store nothing that another engine reads."""
TIERS = frozenset({"fs", "obj", "p2p", "example"})
"""Tiers of the offloading connector with the model in their keys; ``kvcr`` has none."""
SPECS = frozenset({"CPUOffloadingSpec", "TieringOffloadingSpec"})
_DAEMON = "vllm.model_executor.model_loader.weight_cache.daemon"
_MARK = "_expo_serve_keeps_apart"

Create = Callable[..., Any]


def keep_apart() -> None:
    """Let vLLM's factories of connectors create them for one deployment each; in this process, once."""
    for factory in (compat.KVConnectorFactory, compat.ECConnectorFactory):
        create = factory.create_connector.__func__
        if not hasattr(create, _MARK):
            factory.create_connector = classmethod(_for_deployment(create))


def _for_deployment(create: Create) -> Create:
    @wraps(create)
    def created(cls: Any, config: Any, *arguments: Any, **more: Any) -> Any:
        if config.load_config.load_format == "expo":
            refuse_shared_stores(config.kv_transfer_config, config.ec_transfer_config)
            config = _with_own_name(config)
        return create(cls, config, *arguments, **more)

    setattr(created, _MARK, True)
    return created


def _with_own_name(config: Any) -> Any:
    """Return a copy of vLLM's configuration in which the model's name ends with the deployment's digest."""
    extra = config.load_config.model_loader_extra_config
    ours = parse_config(extra, "--model-loader-extra-config")
    own = copy(config)
    own.model_config = copy(config.model_config)
    digest = deployment_id(ours, own.model_config.model, own.model_config.revision)
    own.model_config.model = f"{own.model_config.model.rstrip('/')}--expo-{digest}"
    return own


def refuse_shared_stores(*transfers: Any) -> None:
    """Refuse connectors in whose stores the content of deployments would mix.

    Args:
        transfers: vLLM's KV and encoder cache transfer configurations; None where there is none.

    Raises:
        ConfigError: names the connector.
    """
    for transfer in transfers:
        for problem in _problems(_as_mapping(transfer)):
            raise ConfigError(
                f"{problem}: deployments with one model and different alphas would read each other's content; use one "
                f"of {', '.join(sorted(KEYED_BY_MODEL | OF_ONE_ENGINE))}"
            )


def _as_mapping(transfer: Any) -> Mapping[str, Any]:
    if transfer is None:
        return {}
    if isinstance(transfer, str):
        transfer = json.loads(transfer)
    return transfer if isinstance(transfer, Mapping) else vars(transfer)


def _problems(transfer: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a transfer configuration, or one of the connectors that it joins, mixes deployments."""
    name = transfer.get("kv_connector") or transfer.get("ec_connector")
    if name is None:
        return
    flag = "--kv-transfer-config" if "kv_connector" in transfer else "--ec-transfer-config"
    extra = transfer.get("kv_connector_extra_config") or transfer.get("ec_connector_extra_config") or {}
    if transfer.get("kv_connector_module_path") or transfer.get("ec_connector_module_path"):
        yield f"{flag}: {name} is not one of vLLM's own connectors, and what its keys hold is not known"
    elif name == "MultiConnector":
        for child in extra.get("connectors", []):
            yield from _problems(child)
    elif name not in KEYED_BY_MODEL | OF_ONE_ENGINE:
        yield f"{flag}: the keys of {name} do not hold the model"
    elif name == "OffloadingConnector":
        yield from _problems_of_offloading(extra)


def _problems_of_offloading(extra: Mapping[str, Any]) -> Iterator[str]:
    if (spec := extra.get("spec_name", "CPUOffloadingSpec")) not in SPECS:
        yield f"--kv-transfer-config: what the keys of the offloading spec {spec} hold is not known"
    for tier in extra.get("secondary_tiers", []):
        if (kind := tier.get("type")) not in TIERS:
            yield f"--kv-transfer-config: the keys of the offloading tier {kind} do not hold the model"


def refuse_weight_cache() -> None:
    """Refuse to load in the daemon of ``vllm preload``.

    Its keys hold the headers of the checkpoint, not our configuration: an engine that asks for the plain checkpoint, or
    for another alpha, would be given these weights.

    Raises:
        ConfigError: this process is such a daemon.
    """
    if _DAEMON in sys.modules:
        raise ConfigError(
            "vllm preload: its weight cache does not tell alphas apart, so that other servers would get these weights; "
            "serve without --load-format ipc_cache"
        )
