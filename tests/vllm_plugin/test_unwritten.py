"""A parameter that nothing fills is an error, also where plain vLLM says nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from expo_serve.errors import LoadError
from expo_serve.vllm_plugin.unwritten import _unpadded_sizes
from tests.compare import by_expo
from tests.inprocess import vllm_model
from tests.models import build_pair
from tests.models.extras import make_reward_model

POOLING: dict[str, Any] = {"runner": "pooling"}


def drop(folder: Path, part: str) -> None:
    """Take the tensors away whose names hold ``part``."""
    file = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if part not in name}
    save_file(kept, file, {"format": "pt"})


@pytest.mark.engine
@pytest.mark.parametrize(
    ("part", "arguments", "names"),
    [
        ("score", POOLING, r"score\.weight: 0 of 64"),
        ("down_proj", POOLING, r"layers\.1\.mlp\.down_proj\.weight: 0 of"),
        ("embed_tokens", POOLING, r"embed_tokens\.weight: 0 of"),
        ("model.norm", {"quantization": "fp8_per_channel"}, r"norm\.weight: 0 of 64"),
    ],
    ids=["its head", "a matrix of every layer", "its embedding", "its norm, quantised"],
)
@pytest.mark.usefixtures("destination")
def test_model_without(part: str, arguments: dict[str, Any], names: str, tmp_path: Path) -> None:
    base, aligned = build_pair(tmp_path)
    for folder in (base, aligned):
        if arguments is POOLING:
            make_reward_model(folder)
        drop(folder, part)
    with (
        pytest.raises(LoadError, match=f"not loaded from the checkpoint(.|\n)*{names}"),
        vllm_model(aligned, **by_expo(base, 0.5), **arguments),
    ):
        pass


def test_padded_experts_want_all_that_a_checkpoint_has() -> None:
    moe = SimpleNamespace(
        hidden_dim=256,
        hidden_dim_unpadded=256,
        intermediate_size_per_partition=320,
        intermediate_size_per_partition_unpadded=260,
    )
    elements = 8 * 256 * 320
    found = _unpadded_sizes(SimpleNamespace(moe_config=moe), elements)
    assert 8 * 256 * 260 in found
    assert 256 * 260 not in found  # one expert of eight
    assert _unpadded_sizes(SimpleNamespace(), elements) == set()
