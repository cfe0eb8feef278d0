"""Every call of ``expo-serve delta`` that is refused: at once, in one line, and nothing is left."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from expo_serve.cli import delta
from expo_serve.errors import ExpoError, UsageError
from tests.cli.test_merge import left_in
from tests.command import refused
from tests.models.raw import tiny_tensors, write_pair, write_raw
from tests.server import run_command
from tests.test_cli_speed import HEAVY, imported

SOURCES = ["--base", "b", "--aligned", "a", "--out", "o"]
HELP = "; see expo-serve delta --help"
OF = {action: f"; see expo-serve delta {action} --help" for action in ("create", "verify", "apply")}
WRONG: dict[str, tuple[list[str], str]] = {
    "nothing": ([], f"delta: expected create, verify or apply, found nothing{HELP}"),
    "unknown action": (["pack", *SOURCES], f"delta: expected create, verify or apply, found 'pack'{HELP}"),
    "flags first": (["--base", "b", "create"], f"delta: expected create, verify or apply, found '--base'{HELP}"),
    "create without base": (
        ["create", "--aligned", "a", "--out", "o"],
        f"delta create: --base is missing{OF['create']}",
    ),
    "create without aligned": (
        ["create", "--base", "b", "--out", "o"],
        f"delta create: --aligned is missing{OF['create']}",
    ),
    "create without out": (
        ["create", "--base", "b", "--aligned", "a"],
        f"delta create: --out is missing{OF['create']}",
    ),
    "create with an empty base": (
        ["create", "--base", "", *SOURCES[2:]],
        f"delta create: --base is missing{OF['create']}",
    ),
    "create of a delta": (["create", *SOURCES, "--delta", "d"], f"delta create takes no --delta{OF['create']}"),
    "verify without delta": (["verify", "--base", "b"], f"delta verify: --delta is missing{OF['verify']}"),
    "verify without base": (["verify", "--delta", "d"], f"delta verify: --base is missing{OF['verify']}"),
    "verify with out": (
        ["verify", "--base", "b", "--delta", "d", "--out", "o"],
        f"delta verify takes no --out{OF['verify']}",
    ),
    "apply without out": (["apply", "--base", "b", "--delta", "d"], f"delta apply: --out is missing{OF['apply']}"),
    "apply with aligned": (["apply", *SOURCES, "--delta", "d"], f"delta apply takes no --aligned{OF['apply']}"),
    "unknown flag": (["create", *SOURCES, "--alpha", "1"], f"delta create takes no --alpha{OF['create']}"),
    "abbreviated flag": (["create", *SOURCES, "--unm", "copy"], f"delta create takes no --unm{OF['create']}"),
    "a word too many": (["create", *SOURCES, "more"], f"delta create takes no more{OF['create']}"),
    "flag without its value": (
        ["create", *SOURCES[2:], "--base"],
        f"argument --base: expected one argument{OF['create']}",
    ),
    "no size": (
        ["apply", "--base", "b", "--delta", "d", "--out", "o", "--max-shard-size", "x"],
        "--max-shard-size: expected a size such as 5GB or 500MB, found 'x'",
    ),
    "out in no folder": (["create", *SOURCES[:4], "--out", "/no/such/o"], "--out: /no/such does not exist"),
    "out exists": (
        ["create", *SOURCES[:4], "--out", "/tmp"],
        "--out: /tmp exists; give a folder that does not exist yet",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_call_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        delta.main(arguments)
    assert caught.value.message == message


def test_unknown_choice_is_refused_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"--unmatched: invalid choice: 'maybe' .*refuse.*copy.*; see "):
        delta.main(["create", *SOURCES, "--unmatched", "maybe"])


@pytest.mark.parametrize("name", ["nothing", "unknown action", "create without base", "out exists"])
def test_refusal_by_the_command_is_quick(name: str) -> None:
    arguments, message = WRONG[name]
    refused("delta", *arguments, words=(message,))
    code, packages = imported("delta", *arguments)
    assert code == 2
    assert "expo_serve" in packages, "imports are not seen"
    assert not packages & HEAVY


FLAGS = {
    "create": ("--base", "--aligned", "--out", "--unmatched", "--base-revision", "--hf-token"),
    "verify": ("--base", "--delta", "--aligned", "--delta-revision", "--download-dir"),
    "apply": ("--base", "--delta", "--out", "--max-shard-size"),
}


def test_help_names_the_actions() -> None:
    said = run_command("delta", "--help").stdout
    assert all(f"\n    {action} " in said for action in FLAGS)
    assert "Exit codes: 0 success; " in said


@pytest.mark.parametrize("action", FLAGS)
def test_each_action_has_its_help(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        delta.main([action, "--help"])
    said = capsys.readouterr().out
    assert caught.value.code == 0
    assert said.startswith(f"usage: expo-serve delta {action} ")
    shown = {word.rstrip(",") for word in said.split() if word.startswith("--")}
    assert shown >= set(FLAGS[action])
    assert not shown & {flag for flags in FLAGS.values() for flag in flags} - set(FLAGS[action]) - KNOWN_TO_ALL


KNOWN_TO_ALL = {"--base-revision", "--delta-revision", "--hf-token", "--download-dir"}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(tmp_path)


@pytest.fixture
def packed(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    out = tmp_path / "delta"
    assert delta.main(["create", "--base", str(pair[0]), "--aligned", str(pair[1]), "--out", str(out)]) == 0
    return out


def test_sources_that_do_not_fit_are_refused_without_torch(
    pair: tuple[Path, Path], packed: Path, tmp_path: Path
) -> None:
    other = str(write_raw(tmp_path / "other", tiny_tensors(layers=3)))
    calls = [
        ("create", "--base", str(pair[0]), "--aligned", other, "--out", str(tmp_path / "out")),
        ("verify", "--base", other, "--delta", str(pair[0])),
        ("verify", "--base", str(write_raw(tmp_path / "wide", tiny_tensors(hidden=4))), "--delta", str(packed)),
    ]
    for call in calls:
        code, packages = imported("delta", *call)
        assert code == 2
        assert not packages & {"torch", "vllm"}
    assert left_in(tmp_path) == ["aligned", "base", "delta", "other", "wide"]


@pytest.mark.parametrize("action", ["create", "apply"])
@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_out_that_exists_is_left_as_it_is(
    pair: tuple[Path, Path], packed: Path, tmp_path: Path, action: str, kind: str
) -> None:
    out = tmp_path / "out"
    if kind == "dangling link":
        out.symlink_to("gone")
    else:
        Path.mkdir(out) if kind == "folder" else Path.touch(out)
    source = ["--aligned", str(pair[1])] if action == "create" else ["--delta", str(packed)]
    with pytest.raises(UsageError, match=f"--out: {out} exists"):
        delta.main([action, "--base", str(pair[0]), *source, "--out", str(out)])
    assert left_in(tmp_path) == ["aligned", "base", "delta", "out"]


def test_wrong_base_is_refused_naming_the_tensor(packed: Path, tmp_path: Path) -> None:
    other = write_raw(tmp_path / "wide", tiny_tensors(hidden=4))
    words = ("wide is not the base that delta was made against (base)", "differs in 8 of 8 tensors", "give that base")
    printed = refused("delta", "verify", "--base", str(other), "--delta", str(packed), words=words)
    assert "the first lm_head.weight" in printed.splitlines()[-1] or "the first model." in printed.splitlines()[-1]


def test_checkpoint_is_no_packed_delta(pair: tuple[Path, Path]) -> None:
    words = (str(pair[1]), "is a full delta, which carries no checksums")
    whole = "--base", str(pair[0]), "--delta", str(pair[1]), "--allow", "whole-checkpoint"
    refused("delta", "verify", *whole, words=words)


SERVE: dict[str, tuple[list[str], str]] = {
    "both": (["--aligned", "a", "--delta", "d"], "--aligned and --delta are both given: leave one out"),
    "delta's revision": (["--aligned", "a", "--delta-revision", "r"], "--delta-revision is given, but --delta is not"),
    "aligned's revision": (
        ["--delta", "d", "--aligned-revision", "r"],
        "--aligned-revision is given, but --aligned is not",
    ),
    "empty delta": (["--delta", ""], "--delta is empty: expected a folder or hub id"),
}


@pytest.mark.parametrize(("flags", "words"), SERVE.values(), ids=SERVE)
def test_wrong_sources_are_refused(flags: list[str], words: str) -> None:
    refused("--base", "b", "--alpha", "0.5", *flags, words=(words,))


@pytest.mark.parametrize("command", [["inspect"], ["merge", "--out", "o"]], ids=["inspect", "merge"])
def test_other_commands_refuse_them_too(command: list[str]) -> None:
    flags, words = SERVE["both"]
    refused(*command, "--base", "b", "--alpha", "0.5", *flags, words=(words,))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for some of what is written."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def large(tmp_path: Path) -> list[str]:
    """The flags of a pair whose delta is larger than that disk."""
    base = {**tiny_tensors(1), "large.weight": torch.randn(300, 400)}
    aligned = {**tiny_tensors(2), "large.weight": torch.randn(300, 400)}
    sides = write_raw(tmp_path / "base", base), write_raw(tmp_path / "aligned", aligned)
    (sides[1] / "tokenizer.json").write_text("{}")
    return ["--base", str(sides[0]), "--aligned", str(sides[1])]


def test_full_disk_is_one_line_and_leaves_nothing(small_disk: Path, large: list[str]) -> None:
    out = small_disk / "out"
    words = (f"delta create: {small_disk}/.out.", "No space left on device; nothing was written to", str(out))
    printed = refused("delta", "create", *large, "--out", str(out), words=words, code=1)
    warning, _ = printed.splitlines()
    assert "may need up to 0.000481 GB, 0.000131 GB are free" in warning
    assert left_in(small_disk) == []


def test_full_disk_leaves_nothing_of_what_is_applied(small_disk: Path, large: list[str], tmp_path: Path) -> None:
    packed, out = tmp_path / "delta", small_disk / "out"
    assert delta.main(["create", *large, "--out", str(packed)]) == 0
    with pytest.raises(ExpoError, match=f"^delta apply: {out} needs 0.000481 GB, 0.000131 GB are free in {small_disk}"):
        delta.main(["apply", *large[:2], "--delta", str(packed), "--out", str(out)])
    assert left_in(small_disk) == []
