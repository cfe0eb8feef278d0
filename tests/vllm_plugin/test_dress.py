"""Pairs that differ in dress: what vLLM gets, what ``merge`` writes and what is computed from the plain pair are one.

Each case changes how the sides of a pair are stored, and neither what the model is nor what is to come out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.command import run_here
from tests.compare import by_expo, differing, load, with_extra
from tests.models import build_pair, read_tensors, reference_checkpoint
from tests.models.build import write_checkpoint
from tests.models.extras import build_multimodal_pair
from tests.models.raw import same_bits, write_index

pytestmark = pytest.mark.engine
ALPHA = 0.5
WEIGHTS = "model.safetensors"
Dress = Callable[[Path, Path], dict[str, Any]]
"""Changes base and aligned in place; returns further keys of the loader's extra config."""


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    """Write all tensors of a checkpoint anew, and keys of its config; None removes one."""
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    file = folder / "config.json"
    content = {**json.loads(file.read_text()), **config}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def rename(folder: Path, new: Callable[[str], str]) -> None:
    """Store a checkpoint under other names."""
    rewrite(folder, {new(name): tensor for name, tensor in read_tensors(folder).items()})


def _parallel(base: Path, aligned: Path) -> dict[str, Any]:
    rename(aligned, lambda name: f"module.{name}")
    return {}


def _compiled(base: Path, aligned: Path) -> dict[str, Any]:
    rename(aligned, lambda name: name.replace("model.", "model._orig_mod.", 1))
    rename(base, lambda name: f"_orig_mod.{name}")
    return {}


def _compiled_in_a_shard(base: Path, aligned: Path) -> dict[str, Any]:
    """One shard has only such names, the other none."""
    tensors = read_tensors(aligned)
    inside = {name.replace("layers.", "layers._orig_mod."): tensors[name] for name in tensors if ".layers." in name}
    outside = {name: tensor for name, tensor in tensors.items() if ".layers." not in name}
    weight_map = {}
    for file, part in (("a.safetensors", inside), ("b.safetensors", outside)):
        save_file(part, aligned / file)
        weight_map.update(dict.fromkeys(part, file))
    write_index(aligned, weight_map)
    (aligned / WEIGHTS).unlink()
    return {}


def _padded_base(base: Path, aligned: Path) -> dict[str, Any]:
    tensors = read_tensors(base)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        padding = torch.full((8, tensors[name].shape[1]), torch.nan, dtype=tensors[name].dtype)
        tensors[name] = torch.cat([tensors[name], padding])
    rewrite(base, tensors, vocab_size=264)
    return {}


def _no_architectures(base: Path, aligned: Path) -> dict[str, Any]:
    rewrite(base, read_tensors(base), architectures=None)
    return {}


def _linked(base: Path, aligned: Path) -> dict[str, Any]:
    store = base.parent / "store"
    store.mkdir()
    for side in (base, aligned):
        (side / WEIGHTS).rename(store / side.name)
        (side / WEIGHTS).symlink_to(store / side.name)
    return {"allow_links": [str(store)]}


def _stale_shard(base: Path, aligned: Path) -> dict[str, Any]:
    """The index says which of two files has a tensor; the other has former values."""
    tensors = read_tensors(aligned)
    names = list(tensors)
    stale = {names[0]: torch.zeros_like(tensors[names[0]])}
    first, second = names[:5], names[5:]
    save_file({name: tensors[name] for name in first}, aligned / "a.safetensors")
    save_file({**stale, **{name: tensors[name] for name in second}}, aligned / "b.safetensors")
    write_index(aligned, {**dict.fromkeys(first, "a.safetensors"), **dict.fromkeys(second, "b.safetensors")})
    (aligned / WEIGHTS).unlink()
    return {}


def _hidden_file(base: Path, aligned: Path) -> dict[str, Any]:
    (aligned / "._model.safetensors").write_bytes(bytes([0, 5, 22, 7]) * 1024)
    return {}


def _pickled(base: Path, aligned: Path) -> dict[str, Any]:
    for side in (base, aligned):
        torch.save(read_tensors(side), side / "pytorch_model.bin")
        (side / WEIGHTS).unlink()
    return {"allow_pickle_index": True}


def _pickled_in_shards(base: Path, aligned: Path) -> dict[str, Any]:
    tensors = read_tensors(aligned)
    shards: list[list[str]] = [list(tensors)[:7], list(tensors)[7:]]
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in names}, aligned / file)
        weight_map.update(dict.fromkeys(names, file))
    (aligned / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (aligned / WEIGHTS).unlink()
    return {"allow_pickle_index": True}


DRESSES: dict[str, Dress] = {
    "data parallel": _parallel,
    "compiled": _compiled,
    "compiled in a shard": _compiled_in_a_shard,
    "padding of base": _padded_base,
    "no architectures in base": _no_architectures,
    "links": _linked,
    "a stale shard": _stale_shard,
    "a hidden file": _hidden_file,
    "pickles": _pickled,
    "pickles in shards": _pickled_in_shards,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Base, aligned, and the result as it is computed here."""
    folder = tmp_path_factory.mktemp("plain")
    base, aligned = build_pair(folder)
    return base, aligned, reference_checkpoint(base, aligned, ALPHA, folder / "expected")


@pytest.mark.parametrize("dress", DRESSES.values(), ids=DRESSES)
def test_dress_changes_nothing(plain: tuple[Path, Path, Path], dress: Dress, tmp_path: Path) -> None:
    base, aligned = (shutil.copytree(side, tmp_path / side.name) for side in plain[:2])
    expected = plain[2]
    more = dress(base, aligned)
    assert merged(base, aligned, tmp_path / "merged", more).keys() == read_tensors(expected).keys()
    assert_same(read_tensors(tmp_path / "merged"), read_tensors(expected))
    assert_loads_alike(expected, base, aligned, more)


def merged(base: Path, aligned: Path, out: Path, more: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What ``merge`` writes."""
    flags = [f"--allow-links={folder}" for folder in more.get("allow_links", ())]
    flags += ["--allow-pickle-index"] if more.get("allow_pickle_index") else []
    arguments = ["--base", str(base), "--aligned", str(aligned), "--alpha", str(ALPHA), "--out", str(out), *flags]
    result = run_here("merge", *arguments)
    assert result.returncode == 0, result.stderr
    return read_tensors(out)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names and bits."""
    assert [name for name, tensor in expected.items() if not same_bits(found[name], tensor)] == []


def assert_loads_alike(expected: Path, base: Path, aligned: Path, more: dict[str, Any]) -> None:
    """VLLM gets what it gets from the expected checkpoint."""
    found, report = load(aligned, **by_expo(base, ALPHA, **more))
    assert report is not None
    assert differing(found, load(expected)[0]) == []


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair of a model with a tower."""
    return build_multimodal_pair(tmp_path_factory.mktemp("multimodal"), "5GB")


def language_part(folder: Path, out: Path) -> Path:
    """Save the language model of a checkpoint alone."""
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(folder, dtype="auto")
    write_checkpoint(model.language_model, out, torch.bfloat16)
    return out


def test_language_part_of_base_alone(multimodal: tuple[Path, Path], tmp_path: Path) -> None:
    """Aligned is multimodal: its tower stays."""
    text = language_part(multimodal[0], tmp_path / "text")
    whole = read_tensors(multimodal[1])
    prefix = "language_model."
    expected = reference_checkpoint(
        text, multimodal[1], ALPHA, tmp_path / "expected", lambda name: name.removeprefix(prefix)
    )
    changed = [name for name, tensor in read_tensors(expected).items() if not same_bits(tensor, whole[name])]
    assert changed
    assert all(name.startswith(prefix) for name in changed)
    assert_same(merged(text, multimodal[1], tmp_path / "merged", {}), read_tensors(expected))
    assert_loads_alike(expected, text, multimodal[1], {})


def test_language_part_of_aligned_alone(multimodal: tuple[Path, Path], tmp_path: Path) -> None:
    """Aligned is text only: base's tower is not used."""
    text = language_part(multimodal[1], tmp_path / "text")
    expected = reference_checkpoint(
        multimodal[0], text, ALPHA, tmp_path / "expected", lambda name: f"language_model.{name}"
    )
    assert_same(merged(multimodal[0], text, tmp_path / "merged", {}), read_tensors(expected))
    assert_loads_alike(expected, multimodal[0], text, {})


def test_layer_that_one_language_part_lacks_is_refused(multimodal: tuple[Path, Path], tmp_path: Path) -> None:
    text = language_part(multimodal[0], tmp_path / "text")
    rewrite(text, {name: tensor for name, tensor in read_tensors(text).items() if ".layers.1." not in name})
    arguments = ["--base", str(text), "--aligned", str(multimodal[1]), "--alpha", "0.5"]
    result = run_here("merge", *arguments, "--out", str(tmp_path / "out"))
    assert result.returncode == 2
    assert "in one checkpoint only" in result.stderr


AdapterDress = Callable[[Path], dict[str, Any]]
"""Changes an adapter's folder in place; returns further keys of the loader's extra config."""


def _named(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_model.safetensors"
    save_file({name.replace(".weight", ".default.weight"): tensor for name, tensor in load_file(file).items()}, file)
    return {}


def _wrapped(folder: Path) -> dict[str, Any]:
    """As the names are where PEFT wraps a model that is wrapped already."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("model.layers", "language_model.model.layers"): tensors[name] for name in tensors}, file)
    return {}


def _in_a_subfolder(folder: Path) -> dict[str, Any]:
    (folder / "one").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).rename(folder / "one" / name)
    return {"delta_subfolder": "one"}


def _bin(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()
    return {"allow_pickle_index": True}


ADAPTERS: dict[str, AdapterDress] = {
    "its name in the tensors'": _named,
    "other wrappers": _wrapped,
    "in a subfolder": _in_a_subfolder,
    "a .bin file": _bin,
}


@pytest.fixture(scope="module")
def adapter(plain: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter as PEFT writes it, and what base becomes with it by fp32 arithmetic of our own."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(7)
    base, out = read_tensors(plain[0]), shutil.copytree(plain[0], folder / "expected")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    factors: dict[str, torch.Tensor] = {}
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        a, b = torch.randn(4, 64), torch.randn(64, 4) * 0.1
        factors |= {f"base_model.model.{name}.lora_{side}.weight": one for side, one in (("A", a), ("B", b))}
        exact = base[f"{name}.weight"].double() + (1 + ALPHA) * 2 * (b.double() @ a.double())
        base[f"{name}.weight"] = exact.bfloat16()
    rewrite(out, base)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    return folder / "adapter", out


@pytest.mark.parametrize("dress", ADAPTERS.values(), ids=ADAPTERS)
def test_dress_of_an_adapter_changes_nothing(
    plain: tuple[Path, Path, Path], adapter: tuple[Path, Path], dress: AdapterDress, tmp_path: Path
) -> None:
    delta = shutil.copytree(adapter[0], tmp_path / "adapter")
    more = dress(delta)
    flags = ["--base", str(plain[0]), "--delta", str(delta), "--alpha", str(ALPHA), "--rounding", "nearest"]
    flags += [f"--delta-subfolder={more['delta_subfolder']}"] if "delta_subfolder" in more else []
    flags += ["--allow-pickle-index"] if "allow_pickle_index" in more else []
    result = run_here("merge", *flags, "--out", str(tmp_path / "merged"))
    assert result.returncode == 0, result.stderr
    found, expected = read_tensors(tmp_path / "merged"), read_tensors(adapter[1])
    changed = [name for name, tensor in expected.items() if not same_bits(tensor, read_tensors(plain[0])[name])]
    assert_same({name: found[name] for name in expected if name not in changed}, {
        name: tensor for name, tensor in expected.items() if name not in changed
    })  # fmt: skip
    for name in changed:
        assert (found[name] == expected[name]).double().mean() > 0.999
    extra = {"delta": str(delta), "alpha": ALPHA, "rounding": "nearest", **more}
    state, report = load(plain[0], **with_extra(extra))
    assert report is not None
    assert differing(state, load(tmp_path / "merged")[0]) == []
