"""``expo-serve delta``: what was packed comes back, and is checked on the way."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import termios
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expo_serve.cli import delta, merge
from expo_serve.errors import CheckpointError, PairError, UsageError, ValuesError
from expo_serve.progress import Progress
from tests.cli.test_merge import assert_same_tensors, left_in
from tests.command import refused
from tests.models import read_tensors, reference_tensors
from tests.models.raw import INDEX, tiny_tensors, write_pair, write_raw
from tests.server import ENGINE_ENV, EXPO_SERVE, run_command

UP = "model.layers.0.mlp.up_proj.weight"
Pair = tuple[Path, Path]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path)


@pytest.fixture
def packed(pair: Pair, tmp_path: Path) -> Path:
    """The pair's delta."""
    run("create", base=pair[0], aligned=pair[1], out=tmp_path / "delta")
    return tmp_path / "delta"


def run(action: str, *more: str, **flags: Path) -> None:
    """Run the command in this process."""
    given = [text for name, path in flags.items() for text in (f"--{name}", str(path))]
    assert delta.main([action, *given, *more]) == 0


def well(*arguments: str, warned: str = "") -> str:
    """Run the real command, which warns of nothing, or of one thing; what it said."""
    result = run_command("delta", *arguments)
    assert result.returncode == 0, result.stderr
    assert (warned in result.stderr, len(result.stderr.splitlines())) == (True, int(bool(warned)))
    return result.stdout


def test_the_command_takes_a_checkpoint_there_and_back(
    tmp_path: Path, pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    """Integers, a value head, grown rows and companion files: all of it comes back."""
    aligned = {**tiny_tensors(2, vocabulary=18), "ids": torch.arange(5), "v_head.summary.weight": torch.ones(1, 8)}
    write_raw(pair[1], aligned, vocab_size=18)
    (pair[1] / "tokenizer.json").write_text('{"of": "aligned"}')
    (pair[1] / "pytorch_model.bin").write_text("never opened")
    base, out, back = str(pair[0]), str(tmp_path / "delta"), tmp_path / "back"
    said = well("create", "--base", base, "--aligned", str(pair[1]), "--out", out, warned="a larger vocabulary")
    assert said.startswith(f"wrote {out}: 0.0 MB, ")
    assert left_in(Path(out)) == ["README.md", "config.json", "delta.safetensors", "tokenizer.json"]
    run("verify", base=pair[0], delta=Path(out))
    assert capsys.readouterr().out == f"{out} is intact, matches base\n"
    run("verify", base=pair[0], delta=Path(out), aligned=pair[1])
    assert capsys.readouterr().out == f"{out} is intact, matches base, and decodes to aligned\n"
    assert well("apply", "--base", base, "--delta", out, "--out", str(back)) == f"wrote {back}\n"
    assert_same_tensors(read_tensors(back), aligned)
    for name in ("config.json", "tokenizer.json"):
        assert (back / name).read_bytes() == (pair[1] / name).read_bytes()
    assert left_in(back) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert left_in(tmp_path) == ["aligned", "back", "base", "delta"]


@pytest.mark.parametrize("flag", ["--max-shard-size", "--max_shard_size"])
def test_aligned_comes_back_in_shards(pair: Pair, packed: Path, tmp_path: Path, flag: str) -> None:
    run("apply", flag, "0.5KB", base=pair[0], delta=packed, out=tmp_path / "back")
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2
    assert max(sum(tensor.nbytes for tensor in load_file(file).values()) for file in files) <= 500
    assert (tmp_path / "back" / INDEX).exists()
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(pair[1]))


def test_sharded_checkpoints_are_packed(tmp_path: Path) -> None:
    names = list(tiny_tensors())
    base = write_raw(tmp_path / "base", tiny_tensors(1), shards=[names[:3], names[3:]])
    aligned = write_raw(tmp_path / "aligned", tiny_tensors(2), shards=[names[:5], names[5:]])
    run("create", base=base, aligned=aligned, out=tmp_path / "delta")
    run("apply", base=base, delta=tmp_path / "delta", out=tmp_path / "back")
    assert left_in(tmp_path / "delta") == ["README.md", "config.json", "delta.safetensors"]
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(aligned))


def test_what_only_aligned_has_is_stored_when_asked_for(pair: Pair, tmp_path: Path) -> None:
    aligned = {**tiny_tensors(2), "new.weight": torch.randn(3, 3)}
    write_raw(pair[1], aligned)
    run("create", "--unmatched", "copy", base=pair[0], aligned=pair[1], out=tmp_path / "delta")
    run("apply", base=pair[0], delta=tmp_path / "delta", out=tmp_path / "back")
    assert_same_tensors(read_tensors(tmp_path / "back"), aligned)


def test_merge_takes_a_delta_in_place_of_aligned(pair: Pair, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    flags = ["--base", str(pair[0]), "--delta", str(packed), "--alpha", "0.5", "--out", str(out)]
    assert merge.main(flags) == 0
    assert_same_tensors(read_tensors(out), reference_tensors(*pair, 0.5))


def test_verify_notices_another_aligned(pair: Pair, packed: Path, tmp_path: Path) -> None:
    """One bit of one value, then a shape, then a tensor that is missing."""
    tensors = read_tensors(pair[1])
    tensors[UP].view(torch.int16)[3, 3] ^= 1
    other = write_raw(tmp_path / "other", tensors)
    flags = ("delta", "verify", "--base", str(pair[0]), "--delta", str(packed), "--aligned", str(other))
    refused(*flags, words=(f"tensor '{UP}' in {other}", "made from another checkpoint than other"), code=1)
    write_raw(other, {**tensors, UP: torch.ones(12, 9).bfloat16()})
    assert _other_tensor(pair, packed, other) == f"{UP}: BF16 [12, 8] in the delta, BF16 [12, 9] in aligned"
    write_raw(other, {name: tensor for name, tensor in tensors.items() if name != UP})
    assert _other_tensor(pair, packed, other) == f"{UP}: BF16 [12, 8] in the delta, nothing in aligned"
    write_raw(other, {**tensors, "more": torch.ones(1)})
    assert _other_tensor(pair, packed, other) == "more: nothing in the delta, F32 [1] in aligned"


def _other_tensor(pair: Pair, packed: Path, other: Path) -> str:
    """The one detail of the refusal."""
    with pytest.raises(
        PairError, match="from another checkpoint than other: 1 tensor differs in name, dtype or shape, the first "
    ) as caught:
        run("verify", base=pair[0], delta=packed, aligned=other)
    (detail,) = caught.value.details
    assert caught.value.message.endswith(f"the first {detail.split(':')[0]}")
    return detail


def test_verify_notices_damage(pair: Pair, packed: Path) -> None:
    file = packed / "delta.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^{file}: tensor 'model.*': block 0 is damaged \(wrong checksum\)"):
        run("verify", base=pair[0], delta=packed)


@pytest.mark.parametrize("action", ["verify", "apply"])
def test_other_values_in_base_are_noticed(pair: Pair, packed: Path, tmp_path: Path, action: str) -> None:
    tensors = read_tensors(pair[0])
    tensors[UP].view(torch.int16)[3, 3] ^= 1
    other = write_raw(tmp_path / "other", tensors)
    out = {"out": tmp_path / "back"} if action == "apply" else {}
    with pytest.raises(ValuesError, match=rf"delta was made against \(base\): .*'{UP}' in {other}.*give that base"):
        run(action, base=other, delta=packed, **out)
    assert left_in(tmp_path) == ["aligned", "base", "delta", "other"]


ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "base_model_name_or_path": "base",
    "target_modules": ["up_proj"],
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Two times B A on one module, in numbers that bf16 and fp32 hold exactly."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    prefix = f"base_model.model.{UP.removesuffix('.weight')}"
    factors = {"A": torch.arange(16).view(2, 8) / 64, "B": torch.arange(24).view(12, 2) / 32}
    save_file(
        {f"{prefix}.lora_{name}.weight": factor for name, factor in factors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def test_apply_takes_a_lora_adapter(pair: Pair, adapter: Path, tmp_path: Path) -> None:
    (adapter / "tokenizer.json").write_text('{"of": "adapter"}')
    out = tmp_path / "back"
    run("apply", "--rounding", "nearest", base=pair[0], delta=adapter, out=out)
    expected, factors = read_tensors(pair[0]), load_file(adapter / "adapter_model.safetensors")
    a, b = (next(tensor for name, tensor in factors.items() if f"lora_{part}" in name) for part in "AB")
    expected[UP] = (expected[UP].float() + 2 * (b @ a)).bfloat16()
    assert_same_tensors(read_tensors(out), expected)
    assert left_in(out) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert (out / "config.json").read_bytes() == (pair[0] / "config.json").read_bytes()


def test_lora_adapter_has_nothing_to_verify(pair: Pair, adapter: Path) -> None:
    with pytest.raises(UsageError, match="is a lora delta, which carries no checksums"):
        run("verify", base=pair[0], delta=adapter)


@pytest.mark.parametrize("action", ["create", "verify", "apply"])
def test_lines_say_how_far_it_is_without_a_terminal(
    pair: Pair,
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    action: str,
) -> None:
    """After each step the work waits for the next line, so that none is missed."""
    monkeypatch.setattr(Progress, "tick_seconds", 0.001)
    monkeypatch.setattr(Progress, "line_seconds", 0.0)
    printed: list[str] = []

    def advance(progress: Progress, size: int) -> None:
        capsys.readouterr()
        original(progress, size)
        seen, deadline = "", time.monotonic() + 10
        while seen.count("\n") < 2:  # one that was under way, one that is not
            assert time.monotonic() < deadline
            seen += capsys.readouterr().err
            time.sleep(0.001)
        printed.append(seen.splitlines()[-1])

    original = Progress.advance
    monkeypatch.setattr(Progress, "advance", advance)
    sides = {"aligned": pair[1]} if action == "create" else {"delta": packed}
    out = {} if action == "verify" else {"out": tmp_path / "out"}
    run(action, base=pair[0], **sides, **out)
    assert len(printed) == len(tiny_tensors())
    assert all(line.startswith(f"expo-serve: delta {action}: ") and line.endswith(" s left") for line in printed)
    assert printed[-1].startswith(f"expo-serve: delta {action}: 100% after 0 s, 0.0 GB read at ")


def test_a_terminal_gets_a_bar(pair: Pair, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 120))
    flags = ["--base", str(pair[0]), "--aligned", str(pair[1]), "--out", str(tmp_path / "delta")]
    environment = {**ENGINE_ENV, "TERM": "xterm"}
    with subprocess.Popen(
        [*EXPO_SERVE, "delta", "create", *flags], stdout=subprocess.PIPE, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        drawn = _read_all(ours)
        assert process.wait(60) == 0
    assert "expo-serve: delta create: 100%|█" in drawn
    size = sum(tensor.nbytes for tensor in tiny_tensors().values())
    assert f"{size / 1000:.2f}k/{size / 1000:.2f}k" in drawn
    assert " after " not in drawn, "a line"


def _read_all(descriptor: int) -> str:
    """Until the writer is gone, which is an error of the device."""
    parts = []
    try:
        while part := os.read(descriptor, 4096):
            parts.append(part)
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return b"".join(parts).decode()
