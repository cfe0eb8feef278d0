"""Adapters where people have them: in subfolders, beside a model, as .bin files, with their name in the tensors'."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.command import refused, run_here
from tests.models.adapters import factors, write_adapter
from tests.models.raw import INDEX, same_bits, tiny_tensors, write_raw
from tests.models.reference import read_tensors

MODULE = "model.layers.0.self_attn.q_proj"
NAME = f"{MODULE}.weight"
PREFIX = "base_model.model."
Tensors = Mapping[str, torch.Tensor]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = write_raw(tmp_path / "base", tiny_tensors())
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def adapter() -> Tensors:
    torch.manual_seed(7)
    return factors(MODULE, 8, 8)


def applied(base: Path, delta: Path, out: Path, *more: str) -> dict[str, torch.Tensor]:
    """What ``delta apply`` writes."""
    result = run_here("delta", "apply", "--base", str(base), "--delta", str(delta), "--out", str(out), *more)
    assert result.returncode == 0, result.stderr
    return read_tensors(out)


@pytest.fixture
def expected(base: Path, adapter: Tensors, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Base with the adapter from a folder as PEFT writes it."""
    found = applied(base, write_adapter(tmp_path / "plain", adapter), tmp_path / "expected")
    assert [name for name, tensor in read_tensors(base).items() if not same_bits(tensor, found[name])] == [NAME]
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names and bits."""
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


def test_beside_a_sharded_model(
    base: Path, adapter: Tensors, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    names = list(tiny_tensors())
    folder = write_raw(tmp_path / "both", tiny_tensors(1), shards=[names[:3], names[3:]])
    write_adapter(folder, adapter)
    assert (folder / INDEX).exists()
    assert_same(applied(base, folder, tmp_path / "out"), expected)


@pytest.mark.parametrize("name", ["default", "my_adapter"])
def test_tensors_that_have_the_adapters_name(
    base: Path, adapter: Tensors, expected: dict[str, torch.Tensor], tmp_path: Path, name: str
) -> None:
    named = {key.replace(".weight", f".{name}.weight"): tensor for key, tensor in adapter.items()}
    folder = write_adapter(tmp_path / "named", named)
    assert_same(applied(base, folder, tmp_path / "out"), expected)


def test_two_adapters_in_one_file_are_refused(base: Path, adapter: Tensors, tmp_path: Path) -> None:
    named = {
        key.replace(".weight", f".{name}.weight").replace("layers.0", f"layers.{layer}"): tensor.clone()
        for layer, name in enumerate(("one", "two"))
        for key, tensor in adapter.items()
    }
    folder = write_adapter(tmp_path / "named", named)
    words = ("holds 2 adapters (one, two)", "save each in a folder of its own")
    refused("inspect", "--base", str(base), "--delta", str(folder), "--alpha", "0.5", words=words)


def test_named_subfolder(base: Path, adapter: Tensors, expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write_adapter(tmp_path / "several" / "one", adapter)
    write_adapter(tmp_path / "several" / "two", {key: 2 * tensor for key, tensor in adapter.items()})
    found = applied(base, tmp_path / "several", tmp_path / "out", "--delta-subfolder", "one")
    assert_same(found, expected)
    words = ("holds no delta", "--delta-subfolder one or two")
    refused("inspect", "--base", str(base), "--delta", str(tmp_path / "several"), "--alpha", "0.5", words=words)


def test_bin_file(base: Path, adapter: Tensors, expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "bin", adapter)
    torch.save({f"{PREFIX}{key}": tensor for key, tensor in adapter.items()}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    sides = ["--base", str(base), "--delta", str(folder)]
    refused("inspect", *sides, "--alpha", "0.5", words=("pickle file only", "--allow-pickle-index"))
    assert_same(applied(base, folder, tmp_path / "out", "--allow-pickle-index"), expected)


def test_as_a_side_of_a_pair_it_is_refused(base: Path, adapter: Tensors, tmp_path: Path) -> None:
    folder = str(write_adapter(tmp_path / "adapter", adapter))
    words = ("aligned: ", "holds an adapter, not a checkpoint; give it as --delta")
    refused("inspect", "--base", str(base), "--aligned", folder, "--alpha", "0.5", words=words)
    words = ("base: ", "holds an adapter, not a checkpoint; give the model that it was trained on")
    refused("inspect", "--base", folder, "--aligned", str(base), "--alpha", "0.5", words=words)


PARTS: dict[str, dict[str, Any]] = {
    "magnitudes": {"lora_magnitude_vector": torch.ones(8)},
    "magnitudes of an adapter with a name": {"lora_magnitude_vector.default.weight": torch.ones(8)},
    "a bias of B": {"lora_B.bias": torch.ones(8)},
    "another kind": {"ia3_l": torch.ones(8, 1)},
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("unmatched", ["refuse", "copy"])
def test_parts_that_are_no_sum_are_never_copied(
    base: Path, adapter: Tensors, tmp_path: Path, part: dict[str, torch.Tensor], unmatched: str
) -> None:
    folder = write_adapter(tmp_path / "adapter", {**adapter, **{f"{MODULE}.{key}": part[key] for key in part}})
    sides = ["--base", str(base), "--delta", str(folder), "--alpha", "0.5", "--unmatched", unmatched]
    refused("inspect", *sides, words=("is a part of an adapter that is no plain sum",))


@pytest.mark.parametrize("unmatched", ["refuse", "copy"])
def test_beside_aligned_without_an_index_it_is_refused(
    base: Path, adapter: Tensors, tmp_path: Path, unmatched: str
) -> None:
    aligned = write_raw(tmp_path / "aligned", tiny_tensors(1))
    save_file({f"{PREFIX}{key}": tensor for key, tensor in adapter.items()}, aligned / "adapter_model.safetensors")
    sides = ["--base", str(base), "--aligned", str(aligned), "--alpha", "0.5", "--unmatched", unmatched]
    refused("inspect", *sides, words=("aligned (aligned) holds 2 tensors of an adapter", "as --delta"))


def test_of_a_merged_model_only_the_model_is_written(base: Path, adapter: Tensors, tmp_path: Path) -> None:
    """With an index the adapter beside it is no part of aligned, and its config no file of the result."""
    names = list(tiny_tensors())
    aligned = write_raw(tmp_path / "aligned", tiny_tensors(1), shards=[names[:3], names[3:]])
    write_adapter(aligned, adapter)
    (aligned / "tokenizer.json").write_text("{}")
    arguments = ["--base", str(base), "--aligned", str(aligned), "--alpha", "0.5", "--out", str(tmp_path / "out")]
    assert run_here("merge", *arguments).returncode == 0
    assert read_tensors(tmp_path / "out").keys() == set(names)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
