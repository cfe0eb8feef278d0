"""``expo-serve merge`` writes the numbers of the rule, or nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file

from expo_serve.cli import merge
from expo_serve.config import ExpoConfig, Pinned, Source
from expo_serve.errors import ExpoError, UsageError, ValuesError
from expo_serve.plan.prepare import prepare
from expo_serve.version import __version__
from expo_serve.write.provenance import write_card
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


def test_result_says_where_it_comes_from(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    card = "---\nlicense: apache-2.0\nbase_model: someone/else\n---\n# A model\nIt answers.\n"
    (pair[1] / "README.md").write_text(card)
    out = merged(pair, tmp_path / "out", "--rounding-seed", "7", "--alpha-rule", "norm=0")
    with safe_open(out / "model.safetensors", "pt") as file:
        known = json.loads(file.metadata()["expo_serve"])
    assert known["version"] == __version__
    assert {side: source["name"] for side, source in known["sources"].items()} == {"base": "base", "aligned": "aligned"}
    assert (known["alpha"], known["alpha_rules"], known["rounding"], known["rounding_seed"]) == (
        "0.5", ["norm=0"], "dithered", 7,
    )  # fmt: skip
    found = ModelCard.load(out / "README.md")
    assert found.data.license == "apache-2.0"
    assert found.data.base_model is None  # folders have no name on the hub
    assert "extrapolated with alpha 0.5" in found.text
    assert found.text.count("It answers.") == 1
    again = merged((pair[0], out), tmp_path / "again")
    assert ModelCard.load(again / "README.md").text.count("It answers.") == 1


def test_card_names_sources_of_the_hub(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    config = ExpoConfig(base=str(pair[0]), aligned=str(pair[1]), alpha=0.5)
    pinned = {
        side: Source(name=f"org/{side}", path=str(folder), revision="c0ffee")
        for side, folder in zip(("base", "aligned"), pair, strict=True)
    }
    plan = prepare(config.model_copy(update={"pinned": Pinned(**pinned)}))  # type: ignore[arg-type]
    write_card(tmp_path, plan, config)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == ["org/base", "org/aligned"]
    assert "c0ffee" in card.text


@pytest.mark.parametrize(("alpha", "warned"), [(100, False), (101, True), (10_000, True)])
def test_large_alpha_is_warned_of(
    tmp_path: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], alpha: float, warned: bool
) -> None:
    merged(pair, tmp_path / "out", alpha=alpha)
    assert ("over 100 in size" in capsys.readouterr().err) == warned


def test_effective_alpha_is_said_and_warned_of(
    tmp_path: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = read_tensors(pair[0])
    aligned = {name: tensor.clone() for name, tensor in base.items()}
    for tensor in aligned.values():
        tensor.view(torch.int16).view(-1)[::2] += 1
    small = write_raw(tmp_path / "small", aligned)
    merged((pair[0], small), tmp_path / "nearest", "--rounding", "nearest", alpha=0.25)
    out, err = capsys.readouterr()
    assert "alpha 0.25 (effective 0), rounding nearest" in out
    assert "effective alpha is 0 instead of 0.25" in err
    merged((pair[0], small), tmp_path / "dithered", alpha=0.25)
    assert "rounding dithered" in capsys.readouterr().out


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
