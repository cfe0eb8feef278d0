"""Checkpoints as they really lie on disks: folders, hub caches, mounted volumes; and what of them is not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from expo_serve.checkpoint.folder import Checkpoint, open_checkpoint
from expo_serve.checkpoint.source import HubAccess, find_source
from expo_serve.config import Source
from expo_serve.errors import CheckpointError, SourceError
from tests.models.raw import INDEX, tiny_tensors, write_index, write_raw

NAMES = list(tiny_tensors())
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def opened(folder: Path) -> Checkpoint:
    """A folder as the aligned side."""
    return open_checkpoint("aligned", find_source("aligned", str(folder), None, HubAccess()))


def test_one_file_and_shards_hold_the_same_tensors(tmp_path: Path) -> None:
    whole = opened(write_raw(tmp_path / "whole"))
    shards = opened(write_raw(tmp_path / "shards", shards=[NAMES[5:], NAMES[:5]]))
    assert sorted(whole.tensors) == sorted(shards.tensors) == sorted(NAMES)
    assert whole.nbytes == shards.nbytes == sum(tensor.nbytes for tensor in tiny_tensors().values())
    assert (len(whole.files), len(shards.files)) == (1, 2)
    assert whole.source.fingerprint != shards.source.fingerprint


def test_files_that_the_index_does_not_name_are_not_read(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "model", shards=[NAMES[:5], NAMES[5:]])
    (folder / "other.safetensors").write_bytes(b"damaged")
    (folder / "link.safetensors").symlink_to("/etc/passwd")
    assert len(opened(folder).files) == 2


def test_mistrals_second_copy_is_not_read(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "model")
    (folder / "consolidated.safetensors").write_bytes(b"damaged")
    assert len(opened(folder).files) == 1


def test_only_mistrals_own_format_is_read_when_there_is_no_other(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    assert len(opened(folder).tensors) == len(NAMES)


def test_pickles_beside_safetensors_are_left_alone(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert len(opened(folder).files) == 1


def _hub_snapshot(root: Path, shards: bool = True) -> Path:
    """``models--org--name`` as huggingface_hub lays it out: links from the snapshot to blobs."""
    repository = root / "models--org--name"
    snapshot = write_raw(repository / "snapshots" / COMMIT, shards=[NAMES[:5], NAMES[5:]] if shards else [])
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(repository / "blobs" / f"blob{number}")
        file.symlink_to(f"../../blobs/blob{number}")
    return snapshot


@pytest.mark.parametrize("shards", [False, True])
def test_links_of_a_hub_snapshot_are_fine(tmp_path: Path, shards: bool) -> None:
    found = opened(_hub_snapshot(tmp_path, shards))
    assert len(found.tensors) == len(NAMES)
    assert (found.source.name, found.source.revision) == ("org/name", COMMIT)
    assert (found.source.short_name, found.source.revision) == ("name", COMMIT)


def test_hub_id_in_the_cache_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = _hub_snapshot(tmp_path)
    for revision in (None, "main", COMMIT):
        source = find_source("base", "org/name", revision, HubAccess(cache_dir=str(tmp_path)))
        assert source == Source(name="org/name", path=str(snapshot), revision=COMMIT)
    with pytest.raises(SourceError, match="base: 'org/name' at revision 'other'"):
        find_source("base", "org/name", "other", HubAccess(cache_dir=str(tmp_path)))


def test_snapshot_of_another_commit_than_asked_for_is_refused(tmp_path: Path) -> None:
    snapshot = _hub_snapshot(tmp_path)
    assert find_source("base", str(snapshot), COMMIT, HubAccess()).revision == COMMIT
    with pytest.raises(SourceError, match=f"is commit {COMMIT}, but revision 'main'"):
        find_source("base", str(snapshot), "main", HubAccess())


def test_link_from_a_snapshot_to_another_repository_is_refused(tmp_path: Path) -> None:
    snapshot = _hub_snapshot(tmp_path, shards=False)
    other = write_raw(tmp_path / "models--org--other" / "snapshots" / COMMIT)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "model.safetensors")
    with pytest.raises(CheckpointError, match="leaves the checkpoint"):
        opened(snapshot)


@pytest.mark.parametrize("below", ["model", "all/model"])
def test_folder_that_is_only_named_like_a_hub_repository_opens_no_door(tmp_path: Path, below: str) -> None:
    repository = tmp_path / "models--mine"
    folder = write_raw(repository / below)
    (folder / "model.safetensors").rename(repository / "other.safetensors")
    (folder / "model.safetensors").symlink_to(repository / "other.safetensors")
    with pytest.raises(CheckpointError, match="leaves the checkpoint"):
        opened(folder)


def test_links_of_a_mounted_volume_are_fine(tmp_path: Path) -> None:
    """Kubernetes mounts a ConfigMap or a projected volume as links through ``..data``."""
    folder = tmp_path / "mount"
    write_raw(folder / "..2026_01_01", shards=[NAMES[:5], NAMES[5:]])
    (folder / "..data").symlink_to("..2026_01_01")
    for file in sorted((folder / "..2026_01_01").iterdir()):
        (folder / file.name).symlink_to(f"..data/{file.name}")
    assert len(opened(folder).tensors) == len(NAMES)


def test_folder_may_be_a_link_itself(tmp_path: Path) -> None:
    write_raw(tmp_path / "real-name")
    (tmp_path / "link").symlink_to("real-name")
    assert opened(tmp_path / "link").source.name == "real-name"


def test_endless_link_is_refused(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(CheckpointError, match="broken link"):
        opened(folder)


def test_folder_named_like_a_file_is_refused(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "model")
    (folder / "more.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="regular file"):
        opened(folder)


def test_changed_files_do_not_fit_the_fingerprint(tmp_path: Path) -> None:
    source = opened(write_raw(tmp_path / "model")).source
    assert open_checkpoint("aligned", source).source == source
    write_raw(tmp_path / "model", tiny_tensors(layers=1))
    with pytest.raises(CheckpointError, match=f"has changed since .* expected fingerprint {source.fingerprint}"):
        open_checkpoint("aligned", source)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "gptq"}},
        {"quantization_config": {"bits": 4}},
        {"quantization_config": "int8"},
        {"compression_config": {"quant_method": "compressed-tensors"}},
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
        {"llm_config": {"quantization_config": {"quant_method": "awq"}}},
    ],
)
def test_quantised_config_is_refused_wherever_it_says_so(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"aligned: the checkpoint is quantised .*--quantization"):
        opened(write_raw(tmp_path / "model", **config))


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_quantisers_own_file_is_refused(tmp_path: Path, file: str) -> None:
    folder = write_raw(tmp_path / "model")
    (folder / file).write_text("{}")
    with pytest.raises(CheckpointError, match=f"quantised \\({file}\\)"):
        opened(folder)


def test_empty_quantisation_config_is_none(tmp_path: Path) -> None:
    assert opened(write_raw(tmp_path / "model", quantization_config=None, text_config=3)).tensors


@pytest.mark.parametrize("name", ["weights.gguf"])
def test_gguf_is_named(tmp_path: Path, name: str) -> None:
    folder = write_raw(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(CheckpointError, match="GGUF"):
        opened(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, "\xff\x00"])
def test_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    folder = write_raw(tmp_path / "model")
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        opened(folder)


def test_files_without_any_tensor_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="aligned: no tensor in"):
        opened(write_raw(tmp_path / "model", {}))


@pytest.mark.parametrize("shard", ["", ".", "..", "a/b", "a\\b", "a\0b", "/a", "x" * 256, "\u00e9" * 130, 5, None])
def test_shard_must_be_a_file_name(tmp_path: Path, shard: Any) -> None:
    folder = write_raw(tmp_path / "model")
    write_index(folder, {NAMES[0]: shard})
    with pytest.raises(CheckpointError, match=INDEX):
        opened(folder)


def test_shard_with_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "model")
    write_index(folder, {NAMES[0]: "\ud800"})
    with pytest.raises(CheckpointError, match="file name of a shard"):
        opened(folder)


def test_tensors_of_no_weight_file_at_all_are_not_invented(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "model", shards=[NAMES[:5], NAMES[5:]])
    save_file({"new": torch.zeros(1)}, folder / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="does not contain it"):
        opened(folder)


@pytest.mark.parametrize("given", ["", "~nobody-here/x", "a\0b", "n" * 300, "file:///x", "HF://x/y", "x/y/z"])
def test_source_that_cannot_be_is_refused(given: str) -> None:
    with pytest.raises(SourceError, match="base"):
        find_source("base", given, None, HubAccess())
