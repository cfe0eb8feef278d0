"""What vLLM stores outside of an engine has one key for one deployment: the keys are computed by vLLM's own code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expo_serve.errors import ConfigError
from expo_serve.vllm_plugin import caches
from tests.inprocess import worker_config
from tests.models import build_pair

pytestmark = pytest.mark.engine
STORES = Path(".venv/stores").resolve()
"""Packages of stores, apart from the environment and without what they depend on: keys need no more of them."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build_pair(tmp_path_factory.mktemp("caches"))


class Recorder:
    """In the place of a connector: keeps the configuration that it is given."""

    def __init__(self, config: Any, role: Any, kv_cache_config: Any = None) -> None:
        self.config = config


def given(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, connector: str, alpha: float, **extra: Any) -> Any:
    """The configuration that a connector is created with by vLLM's factory."""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    caches.keep_apart()
    monkeypatch.setattr(KVConnectorFactory, "get_connector_class", lambda config: Recorder)
    monkeypatch.setattr(KVConnectorFactory, "supports_hma_config", lambda config: True)
    ours = {"base": str(pair[0]), "alpha": alpha, **extra}
    with worker_config(pair[1], load_format="expo", model_loader_extra_config=ours) as config:
        config.kv_transfer_config = KVTransferConfig(kv_connector=connector, kv_role="kv_both", engine_id="one")
        made = KVConnectorFactory.create_connector(config, None, None)
        assert config.model_config.model == str(pair[1])  # nothing else of vLLM sees the other name
    return made.config


def file_tier(config: Any) -> str:
    """The folder of the offloading connector's file tier."""
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.kv_offload.file_mapper import FileMapper

    spec = FullAttentionSpec(
        block_size=config.cache_config.block_size, num_kv_heads=1, head_size=16, dtype=config.model_config.dtype
    )
    groups = KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    offloading = build_offloading_config(config, groups)
    return str(FileMapper.from_offloading_spec("/kv", SimpleNamespace(config=offloading)).base_path)


def mooncake(config: Any) -> str:
    """A key of the Mooncake store; its worker takes the last part of the model's path."""
    from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.store.data import KeyMetadata, PoolKey

    name = config.model_config.model.rstrip("/").split("/")[-1]
    metadata = KeyMetadata(model_name=name, tp_rank=0, pcp_rank=0, dcp_rank=0, pp_rank=0)
    return str(PoolKey(metadata, "c0ffee").to_string())


def lmcache(config: Any) -> str:
    """A key of LMCache, from the metadata that its connector makes of vLLM's configuration."""
    sys.path.append(str(STORES))
    try:
        metadata_of: Any = import_module("lmcache.integration.vllm.utils").create_lmcache_metadata
        key: Any = import_module("lmcache.utils").CacheEngineKey
        metadata, _ = metadata_of(config)
    finally:
        sys.path.remove(str(STORES))
    return str(
        key(metadata.model_name, metadata.world_size, metadata.worker_id, 0xC0FFEE, metadata.kv_dtype).to_string()
    )


def nixl(config: Any) -> str:
    """What two NIXL peers must agree on."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import compute_nixl_compatibility_hash

    return str(compute_nixl_compatibility_hash(config, "TORCH_SDPA"))


def encoder_cache(config: Any) -> str:
    """What two peers of the encoder cache on CPUs must agree on."""
    from vllm.distributed.ec_transfer.ec_connector.cpu.protocol import compute_ec_compatibility_hash

    return str(compute_ec_compatibility_hash("0", config.model_config.model, "bfloat16", 16))


KEYS: list[tuple[str, Callable[[Any], str]]] = [
    ("OffloadingConnector", file_tier),
    ("MooncakeStoreConnector", mooncake),
    ("LMCacheConnectorV1", lmcache),
    ("NixlConnector", nixl),
    ("OffloadingConnector", encoder_cache),
]


@pytest.mark.parametrize(("connector", "key_of"), KEYS)
def test_keys_differ_by_deployment_and_are_the_same_after_a_restart(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, connector: str, key_of: Callable[[Any], str]
) -> None:
    deployments: list[dict[str, Any]] = [
        {"alpha": 0.3},
        {"alpha": 0.7},
        {"alpha": 0.3, "rounding": "nearest"},
        {"alpha": 0.3, "rounding_seed": 1},
        {"alpha": 0.3, "alpha_rules": ["lm_head=0"]},
    ]
    keys = [key_of(given(pair, monkeypatch, connector, **deployment)) for deployment in deployments]
    assert len(set(keys)) == len(keys)
    assert keys == [key_of(given(pair, monkeypatch, connector, **deployment)) for deployment in deployments]


@pytest.mark.parametrize("connector", sorted(caches.KEYED_BY_MODEL | caches.OF_ONE_ENGINE))
def test_every_connector_that_is_let_in_exists(connector: str) -> None:
    from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    assert connector in {**KVConnectorFactory._registry, **ECConnectorFactory._registry}


def test_other_load_formats_are_left_alone(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    caches.keep_apart()
    caches.keep_apart()
    monkeypatch.setattr(KVConnectorFactory, "get_connector_class", lambda config: Recorder)
    monkeypatch.setattr(KVConnectorFactory, "supports_hma_config", lambda config: True)
    with worker_config(pair[1]) as config:
        config.kv_transfer_config = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
        made: Any = KVConnectorFactory.create_connector(config, None, None)
        assert made.config is config


REFUSED: list[dict[str, Any]] = [
    {"kv_connector": "ExampleConnector"},
    {"kv_connector": "HF3FSKVConnector"},
    {"kv_connector": "MooncakeConnector"},
    {"kv_connector": "Mine", "kv_connector_module_path": "mine"},
    {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": {"spec_name": "Mine"}},
    {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": {"secondary_tiers": [{"type": "kvcr"}]}},
    {
        "kv_connector": "MultiConnector",
        "kv_connector_extra_config": {"connectors": [{"kv_connector": "FlexKVConnectorV1"}]},
    },
    {"ec_connector": "ECExampleConnector"},
]  # fmt: skip


@pytest.mark.parametrize("transfer", REFUSED)
def test_store_that_would_mix_deployments_is_refused(transfer: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="would read each other's content; use one of"):
        caches.refuse_shared_stores(transfer, None)


def test_store_that_would_mix_is_refused_where_it_is_created(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under plain vLLM nothing looks at the flags before."""
    with pytest.raises(ConfigError, match="ExampleConnector"):
        given(pair, monkeypatch, "ExampleConnector", 0.3)


def test_preloading_is_refused(pair: tuple[Path, Path]) -> None:
    """The daemon that holds weights for others is imported only where it runs."""
    code = (
        "import vllm.model_executor.model_loader.weight_cache.daemon\n"
        "from vllm.config import LoadConfig\n"
        "from vllm.model_executor.model_loader import get_model_loader\n"
        "from expo_serve.vllm_plugin import register\n"
        "register()\n"
        f"get_model_loader(LoadConfig(load_format='expo', model_loader_extra_config={{'base': {str(pair[0])!r},"
        " 'alpha': 0.5}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "weight cache does not tell alphas apart" in done.stderr
