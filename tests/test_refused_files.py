"""Every damaged, hostile or unsuitable checkpoint is refused before a byte of weights is read: by the command's
``main``, and where opening a file is the danger by the real command."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.command import assert_refused_alike, refused, refused_by_command
from tests.models.raw import INDEX, entry, file_bytes, tiny_tensors, write_index, write_pair, write_raw
from tests.server import run_command

NAMES = list(tiny_tensors())
Spoil = Callable[[Path], None]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A pair that would be served, to be spoiled."""
    return write_pair(tmp_path)


def _flags(base: Path, aligned: Path) -> tuple[str, ...]:
    return ("--base", str(base), "--aligned", str(aligned), "--alpha", "0.5")


def _replace(content: Callable[[bytes], bytes]) -> Spoil:
    """Put other bytes in the place of the aligned side's only file."""

    def spoil(aligned: Path) -> None:
        file = aligned / "model.safetensors"
        file.write_bytes(content(file.read_bytes()))

    return spoil


def _header(header: dict[str, Any] | str, data: bytes) -> Spoil:
    return _replace(lambda _: file_bytes(header, data))


FILES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "cut by one byte": (_replace(lambda good: good[:-1]), ("is truncated", "expected 1", "actual 1")),
    "one byte too many": (_replace(lambda good: good + b"x"), ("after the last tensor", "expected 1", "actual 1")),
    "no bytes": (_replace(lambda _: b""), ("file is empty",)),
    "seven bytes": (_replace(lambda _: b"1234567"), ("expected at least 8 bytes", "found 7")),
    "cut within the header": (_replace(lambda good: good[:100]), ("is truncated: the header needs", "92 are left")),
    "absurd header length": (_replace(lambda _: b"\xff" * 64), ("header length is 18446744073709551615",)),
    "no JSON": (_header("{", b""), ("header is not JSON",)),
    "JSON, but a list": (_header("[]", b""), ("must be a JSON object", "list")),
    "overlap": (
        _header({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6)),
        ("tensor 'b'", "overlaps", "expected to begin at byte 1", "begins at 1"),
    ),
    "hole": (
        _header({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 6, 10)}, bytes(10)),
        ("tensor 'b'", "hole", "expected to begin at byte 1", "begins at 1"),
    ),
    "size that does not fit the shape": (
        _header({"a": entry("F32", [4], 0, 8)}, bytes(8)),
        ("tensor 'a'", "takes 16 bytes", "data_offsets give 8"),
    ),
    "one name twice": (
        _header(f'{{"a": {json.dumps(entry("U8", [1], 0, 1))}, "a": {json.dumps(entry("U8", [1], 1, 2))}}}', bytes(2)),
        ("name 'a' twice",),
    ),
    "dtype unknown": (_header({"a": entry("F4", [2], 0, 1)}, bytes(1)), ("quantised (F4)",)),
    "fp8": (_header({"a": entry("F8_E4M3", [4], 0, 4)}, bytes(4)), ("quantised (F8_E4M3)", "--quantization")),
}


@pytest.mark.parametrize(("spoil", "words"), FILES.values(), ids=FILES)
def test_damaged_file_is_refused(pair: tuple[Path, Path], spoil: Spoil, words: tuple[str, ...]) -> None:
    spoil(pair[1])
    named = "aligned" if words[0].startswith("quantised") else f"{pair[1]}/model.safetensors"
    refused(*_flags(*pair), words=(named, *words))


@pytest.mark.parametrize("name", ["cut within the header", "one name twice"])
def test_damaged_file_is_refused_by_the_command(pair: tuple[Path, Path], name: str) -> None:
    spoil, words = FILES[name]
    spoil(pair[1])
    assert_refused_alike(*_flags(*pair), words=words)


def test_damaged_base_is_named_too(pair: tuple[Path, Path]) -> None:
    _replace(lambda good: good[:-1])(pair[0])
    refused(*_flags(*pair), words=(f"{pair[0]}/model.safetensors", "is truncated"))


class _Canary:
    """Sings (creates a file) when it is unpickled."""

    def __init__(self, song: Path) -> None:
        self._song = song

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._song,)


@pytest.mark.parametrize(
    ("protocol", "name"), [(2, "model.safetensors"), (4, "model.safetensors"), ("torch", "model.safetensors"),
                           ("torch", "pytorch_model.bin")],
)  # fmt: skip
def test_pickle_is_never_opened(tmp_path: Path, protocol: int | str, name: str) -> None:
    base, aligned = write_pair(tmp_path)
    (aligned / "model.safetensors").unlink()
    song = tmp_path / "song"
    if protocol == "torch":
        torch.save({"weight": torch.zeros(2), "canary": _Canary(song)}, aligned / name)
    else:
        (aligned / name).write_bytes(pickle.dumps(_Canary(song), protocol=int(protocol)))
    refused_by_command(*_flags(base, aligned), words=(str(aligned), "pickle"))
    assert not song.exists()
    pickle.loads(pickle.dumps(_Canary(song)))
    assert song.exists(), "the canary cannot sing"


def _shard(folder: Path) -> None:
    shutil.rmtree(folder)
    write_raw(folder, shards=[NAMES[:4], NAMES[4:]])


def _index_names(shard: str) -> Spoil:
    def spoil(aligned: Path) -> None:
        _shard(aligned)
        write_index(aligned, {**json.loads((aligned / INDEX).read_text())["weight_map"], NAMES[0]: shard})

    return spoil


def _in_two_files_without_index(aligned: Path) -> None:
    save_file({NAMES[0]: tiny_tensors()[NAMES[0]]}, aligned / "more.safetensors")


def _link_away(aligned: Path) -> None:
    outside = aligned.parent / "outside.safetensors"
    (aligned / "model.safetensors").rename(outside)
    (aligned / "model.safetensors").symlink_to(outside)


def _link_to_nowhere(aligned: Path) -> None:
    (aligned / "model.safetensors").unlink()
    (aligned / "model.safetensors").symlink_to("gone")


def _index_link_away(aligned: Path) -> None:
    _shard(aligned)
    (aligned / INDEX).rename(aligned.parent / "index.json")
    (aligned / INDEX).symlink_to("../index.json")


def _fifo(aligned: Path) -> None:
    (aligned / "model.safetensors").unlink()
    os.mkfifo(aligned / "model.safetensors")


def _fifo_shard(aligned: Path) -> None:
    _index_names("pipe.safetensors")(aligned)
    os.mkfifo(aligned / "pipe.safetensors")


def _broken_index(aligned: Path) -> None:
    (aligned / INDEX).write_text("{")


def _lying_index(aligned: Path) -> None:
    _index_names("model-00002-of-00002.safetensors")(aligned)


LAYOUTS: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "shard above the folder": (_index_names("../x.safetensors"), (INDEX, "'../x.safetensors'", "file name")),
    "shard by absolute path": (_index_names("/etc/passwd"), (INDEX, "'/etc/passwd'", "file name")),
    "shard in a folder below": (_index_names("a/b.safetensors"), (INDEX, "'a/b.safetensors'", "file name")),
    "shard missing": (_index_names("gone.safetensors"), (INDEX, "'gone.safetensors'", "missing")),
    "shard name too long": (_index_names("x" * 300), (INDEX, "file name")),
    "index that lies": (_lying_index, (INDEX, NAMES[0], "does not contain it")),
    "index of nothing": (lambda aligned: write_index(aligned, {}), (INDEX, "weight_map")),
    "index is no JSON": (_broken_index, (INDEX, "not JSON")),
    "one name in two files": (_in_two_files_without_index, (NAMES[0], "model.safetensors", "more.safetensors")),
    "link that leaves": (_link_away, ("model.safetensors", "leaves the checkpoint", "not opened")),
    "link to nowhere": (_link_to_nowhere, ("model.safetensors", "broken link")),
    "index link that leaves": (_index_link_away, (INDEX, "leaves the checkpoint")),
    "FIFO": (_fifo, ("model.safetensors", "regular file", "not opened")),
    "FIFO as a shard": (_fifo_shard, ("pipe.safetensors", "regular file", "not opened")),
    "no weights": (lambda aligned: (aligned / "model.safetensors").unlink(), ("aligned", "no safetensors")),
}


@pytest.mark.parametrize(("spoil", "words"), LAYOUTS.values(), ids=LAYOUTS)
def test_wrong_layout_is_refused(pair: tuple[Path, Path], spoil: Spoil, words: tuple[str, ...]) -> None:
    spoil(pair[1])
    refused(*_flags(*pair), words=words)


@pytest.mark.parametrize("name", ["link that leaves", "FIFO as a shard"])
def test_wrong_layout_is_refused_by_the_command(pair: tuple[Path, Path], name: str) -> None:
    spoil, words = LAYOUTS[name]
    spoil(pair[1])
    assert_refused_alike(*_flags(*pair), words=words)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_quantised_checkpoint_is_refused(pair: tuple[Path, Path], method: str) -> None:
    side = "base" if method == "awq" else "aligned"
    write_raw(pair[0].with_name(side), quantization_config={"quant_method": method})
    refused(*_flags(*pair), words=(f"error: {side}:", "quantised", method, "--quantization"))


def test_value_that_is_not_finite_ends_a_merge_with_1(tmp_path: Path) -> None:
    folders = write_pair(tmp_path)
    tensors = tiny_tensors()
    tensors[NAMES[3]][2, 1] = torch.nan
    folder = write_raw(tmp_path / "base", tensors)
    out = tmp_path / "out"
    words = (NAMES[3], f"{folder}/model.safetensors", "NaN or Inf")
    refused_by_command("merge", *_flags(*folders), "--out", str(out), words=words, code=1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["aligned", "base"]


def test_tensors_on_one_side_only_are_served_when_asked_for(pair: tuple[Path, Path]) -> None:
    write_raw(pair[1], tiny_tensors(layers=3))
    result = run_command("inspect", *_flags(*pair), "--unmatched", "copy", "--json")
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["copied_unmatched"]) == 3


def test_larger_vocabulary_is_served_with_one_warning(pair: tuple[Path, Path]) -> None:
    write_raw(pair[1], tiny_tensors(vocabulary=18), vocab_size=18)
    result = run_command("inspect", *_flags(*pair), "--json")
    found = json.loads(result.stdout)
    grown = {tensor["name"]: tensor["grown_rows"] for tensor in found["tensors"] if tensor["grown_rows"]}
    assert result.returncode == 0, result.stderr
    assert grown == {"model.embed_tokens.weight": 2, "lm_head.weight": 2}
    assert "has no tokenizer" in found["warnings"].pop()
    assert len(found["warnings"]) == 1
    assert "larger vocabulary" in found["warnings"][0]
