"""``expo-serve merge`` writes the numbers of the rule, or nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from expo_serve.cli import merge
from expo_serve.errors import ExpoError, UsageError, ValuesError
from tests.models import read_tensors, reference_tensors
from tests.models.raw import INDEX, same_bits, tiny_tensors, write_pair, write_raw

NAMES = list(tiny_tensors())


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(tmp_path)


def merged(pair: tuple[Path, Path], out: Path, *flags: str, alpha: float = 0.5) -> Path:
    """Run the command in this process."""
    sources = ["--base", str(pair[0]), "--aligned", str(pair[1]), "--alpha", str(alpha)]
    assert merge.main([*sources, "--out", str(out), *flags]) == 0
    return out


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """All names, all bits."""
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


@pytest.mark.parametrize("alpha", [-1, 0, 0.5, 1.7])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_those_of_the_reference(tmp_path: Path, alpha: float, base_dtype: torch.dtype) -> None:
    base = tiny_tensors(1, dtype=base_dtype)
    aligned = {**tiny_tensors(2, vocabulary=18), "ids": torch.arange(3)}
    base["lm_head.weight"][:, 0] = -0.0
    aligned["lm_head.weight"][:, :2] = -0.0
    pair = write_raw(tmp_path / "base", base), write_raw(tmp_path / "aligned", aligned)
    found = read_tensors(merged(pair, tmp_path / "out", alpha=alpha))
    assert_same_tensors(found, reference_tensors(*pair, alpha))


def test_tied_output_of_one_side_is_paired(tmp_path: Path) -> None:
    base = {name: tensor for name, tensor in tiny_tensors(1).items() if name != "lm_head.weight"}
    pair = write_raw(tmp_path / "base", base, tie_word_embeddings=True), write_raw(tmp_path / "aligned")
    found = read_tensors(merged(pair, tmp_path / "out", "--rounding", "nearest"))["lm_head.weight"]
    aligned, tied = tiny_tensors()["lm_head.weight"], base["model.embed_tokens.weight"]
    assert same_bits(found, torch.lerp(tied.float(), aligned.float(), 1.5).bfloat16())


def test_mask_of_infinity_comes_along(tmp_path: Path) -> None:
    name, mask = "model.layers.0.self_attn.masked_bias", torch.tensor(-torch.inf, dtype=torch.float16)
    pair = tuple(write_raw(tmp_path / side, {**tiny_tensors(), name: mask}) for side in ("base", "aligned"))
    assert same_bits(read_tensors(merged((pair[0], pair[1]), tmp_path / "out"))[name], mask)


def test_value_head_stays_behind(tmp_path: Path) -> None:
    head = {"v_head.summary.weight": torch.ones(1, 8)}
    pair = write_raw(tmp_path / "base"), write_raw(tmp_path / "aligned", {**tiny_tensors(), **head})
    assert read_tensors(merged(pair, tmp_path / "out")).keys() == tiny_tensors().keys()


@pytest.mark.parametrize("flag", ["--max-shard-size", "--max_shard_size"])
def test_shards_are_cut_and_indexed(tmp_path: Path, pair: tuple[Path, Path], flag: str) -> None:
    out = merged(pair, tmp_path / "out", flag, "0.5KB")
    index = json.loads((out / INDEX).read_text())
    files = sorted(out.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) > 1
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert max(sizes) <= 500
    assert index["metadata"]["total_size"] == sum(sizes)
    for name, file in index["weight_map"].items():
        assert name in load_file(out / file)
    assert_same_tensors(read_tensors(out), reference_tensors(*pair, 0.5))


def test_result_is_a_checkpoint_that_can_be_merged_again(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    out = merged(pair, tmp_path / "out", "--max-shard-size", "300")
    again = merged((pair[0], out), tmp_path / "again", alpha=0)
    assert_same_tensors(read_tensors(again), read_tensors(out))


def test_companion_files_come_along_and_weights_do_not(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", ".hidden", "pytorch_model.bin", "x.gguf", "y.pt", INDEX):
        (pair[1] / name).write_text("{}" if name != INDEX else _index())
    (pair[1] / "folder").mkdir()
    out = merged(pair, tmp_path / "out")
    names = {file.name for file in out.iterdir()}
    assert names == {"README.md", "config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
    assert (out / "config.json").read_bytes() == (pair[1] / "config.json").read_bytes()


def _index() -> str:
    return json.dumps({"weight_map": dict.fromkeys(NAMES, "model.safetensors")})


def test_modes_are_those_that_others_can_read(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    out = merged(pair, tmp_path / "out")
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert {file.stat().st_mode for file in out.iterdir()} == {(tmp_path / "plain" / "file").stat().st_mode}


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_out_that_exists_is_refused_and_left_as_it_is(tmp_path: Path, pair: tuple[Path, Path], kind: str) -> None:
    out = tmp_path / "out"
    if kind == "dangling link":
        out.symlink_to("gone")
    else:
        Path.mkdir(out) if kind == "folder" else Path.touch(out)
    with pytest.raises(UsageError, match="exists"):
        merged(pair, out)
    assert left_in(tmp_path) == ["aligned", "base", "out"]


@pytest.mark.parametrize("out", ["", "no/such/parent/out", "~nobody-here/out", "n" * 300])
def test_out_that_cannot_be_is_refused(
    tmp_path: Path, pair: tuple[Path, Path], out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="--out"):
        merge.main(["--base", str(pair[0]), "--aligned", str(pair[1]), "--alpha", "1", "--out", out])
    assert left_in(tmp_path) == ["aligned", "base"]


def test_folder_that_cannot_be_written_to_is_one_line(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ExpoError, match="merge: /proc cannot be written to"):
        merged(pair, Path("/proc/out"))


def test_longest_name_is_fine(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    assert merged(pair, tmp_path / ("n" * 255)).is_dir()


@pytest.mark.parametrize("size", ["", "0", "-1", "5XB", "GB", "1e3", "nan"])
def test_shard_size_that_is_none_is_refused(tmp_path: Path, pair: tuple[Path, Path], size: str) -> None:
    with pytest.raises(UsageError, match="--max-shard-size"):
        merged(pair, tmp_path / "out", f"--max-shard-size={size}")


def test_nothing_is_left_when_a_weight_is_not_finite(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    tensors = tiny_tensors()
    tensors[NAMES[-1]][0] = torch.inf
    write_raw(pair[1], tensors)
    with pytest.raises(ValuesError, match=f"'{NAMES[-1]}' in .*aligned/model.safetensors"):
        merged(pair, tmp_path / "out")
    assert left_in(tmp_path) == ["aligned", "base"]


def test_nothing_is_left_when_the_disk_is_full(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(ExpoError, match="No space left on device; nothing was written"):
        merged(pair, tmp_path / "out")
    assert left_in(tmp_path) == ["aligned", "base"]


_STOPPED_WITHIN = """
import os, signal, sys
from expo_serve.cli import main
from expo_serve.write import merged as saving
saving._value = lambda *_: os.kill(os.getpid(), int(sys.argv[1]))
sys.exit(main.main(["merge", *sys.argv[2:]]))
"""


@pytest.mark.parametrize("number", [2, 15])
def test_nothing_is_left_when_a_signal_comes(tmp_path: Path, pair: tuple[Path, Path], number: int) -> None:
    flags = ["--base", str(pair[0]), "--aligned", str(pair[1]), "--alpha", "1", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-c", _STOPPED_WITHIN, str(number), *flags]
    assert subprocess.run(command, check=False, timeout=60).returncode == 128 + number
    assert left_in(tmp_path) == ["aligned", "base"]


def left_in(folder: Path) -> list[str]:
    """What lies in a folder, hidden things too."""
    return sorted(file.name for file in folder.iterdir())
