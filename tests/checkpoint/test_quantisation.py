"""Quantised checkpoints are recognised by their tensors, whatever their config says; others are not taken for such."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from expo_serve.checkpoint.folder import open_checkpoint
from expo_serve.config import Source
from expo_serve.errors import CheckpointError
from tests.models.raw import entry, file_bytes, tiny_tensors, write_index, write_raw

MODULE = "model.layers.0.mlp.up_proj"
Tensors = dict[str, torch.Tensor]


def codes(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def scales(*shape: int) -> torch.Tensor:
    return torch.ones(shape).half()


SCHEMES: dict[str, Tensors] = {
    "MLX": {"weight": codes(8, 2, dtype=torch.uint32), "scales": scales(8, 1), "biases": scales(8, 1)},
    "bitsandbytes, 4 bits": {
        "weight": codes(32, 1, dtype=torch.uint8),
        "weight.absmax": torch.ones(2),
        "weight.quant_map": torch.ones(16),
        "weight.quant_state.bitsandbytes__nf4": codes(80, dtype=torch.uint8),
    },
    "bitsandbytes, 8 bits": {"weight": codes(8, 8, dtype=torch.int8), "SCB": torch.ones(8)},
    "GPTQ": {"qweight": codes(2, 8), "qzeros": codes(1, 1), "scales": scales(1, 8), "g_idx": codes(8)},
    "AWQ": {"qweight": codes(8, 2), "qzeros": codes(1, 1), "scales": scales(1, 8)},
    "compressed-tensors": {"weight_packed": codes(8, 1), "weight_scale": scales(8, 1), "weight_shape": codes(2)},
    "integers for a weight": {"weight": codes(8, 8, dtype=torch.int8), "weight_scale": scales(8, 1)},
}


def opened(folder: Path, tensors: Tensors, **config: Any) -> None:
    """Open a checkpoint with these tensors."""
    write_raw(folder, tensors, **config)
    open_checkpoint("base", Source(name="base", path=str(folder)))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_integers_beside_scales(tmp_path: Path, scheme: Tensors) -> None:
    plain = {name: tensor for name, tensor in tiny_tensors().items() if not name.startswith(MODULE)}
    with pytest.raises(CheckpointError, match=rf"^base: tensor '{MODULE}\..*' .* is quantised: it holds integers"):
        opened(tmp_path / "base", {**plain, **{f"{MODULE}.{name}": tensor for name, tensor in scheme.items()}})


def test_blocks_of_experts(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks = {f"{name}_blocks": codes(2, 8, 4, dtype=torch.uint8), f"{name}_scales": codes(2, 8, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match="is quantised: it holds integers"):
        opened(tmp_path / "base", {**tiny_tensors(), **blocks})


@pytest.mark.parametrize(
    "config",
    [{"quantization": {"group_size": 32, "bits": 4}}, {"text_config": {"quantization": {"mode": "mxfp4"}}}],
)
def test_key_of_the_config(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"the checkpoint is quantised \((MLX|mxfp4)\)"):
        opened(tmp_path / "base", tiny_tensors(), **config)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_dtypes_below_a_byte(tmp_path: Path, dtype: str) -> None:
    write_raw(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(file_bytes({"a": entry(dtype, [8], 0, 4)}, bytes(4)))
    with pytest.raises(CheckpointError, match=rf"is quantised \({dtype}\)"):
        open_checkpoint("base", Source(name="base", path=str(tmp_path / "base")))


PLAIN: dict[str, Callable[[], Tensors]] = {
    "a learned scale": lambda: {"model.layers.0.norm.scale": torch.ones(8)},
    "integers alone": lambda: {"model.ids.weight": codes(8, 8)},
    "an index beside a scale": lambda: {
        "model.table.relative_position_index": codes(8, 8),
        "model.table.scale": scales(8),
    },
    "counters": lambda: {"model.bn.num_batches_tracked": codes(1), "model.bn.weight": torch.ones(8)},
}


@pytest.mark.parametrize("more", PLAIN.values(), ids=PLAIN)
def test_others_are_not_taken_for_such(tmp_path: Path, more: Callable[[], Tensors]) -> None:
    opened(tmp_path / "base", {**tiny_tensors(), **more()})


def test_absurd_number_of_shards_takes_no_time(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "base")
    (folder / "model.safetensors").rename(folder / "model-00001-of-999999999.safetensors")
    with pytest.raises(CheckpointError, match="999999998 of 999999999 shards are missing"):
        open_checkpoint("base", Source(name="base", path=str(folder)))


def test_index_that_names_a_pickle_does_not_open_it(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "base")
    torch.save({"a.weight": torch.zeros(2)}, folder / "pytorch_model.bin")
    write_index(folder, {"a.weight": "pytorch_model.bin"})
    with pytest.raises(CheckpointError, match="it looks like a PyTorch pickle"):
        open_checkpoint("base", Source(name="base", path=str(folder)))


@pytest.mark.parametrize("missing", [[1], [2], [1, 3]])
def test_half_a_checkpoint_is_named_by_its_missing_shards(tmp_path: Path, missing: list[int]) -> None:
    folder = write_raw(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    for number, (name, tensor) in enumerate(list(tiny_tensors().items())[:3], start=1):
        if number not in missing:
            save_file({name: tensor}, folder / f"model-{number:05}-of-00003.safetensors")
    names = ", ".join(f"model-{number:05}-of-00003.safetensors" for number in missing)
    with pytest.raises(CheckpointError, match=rf"{len(missing)} of 3 shards are missing \({names}\)"):
        open_checkpoint("base", Source(name="base", path=str(folder)))
