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
from tests.test_cli_speed import (
    HEAVY,
    imported,
)
from tests.test_cli_speed import (
    test_answer_takes_less_than_half_a_second as takes_less_than_half_a_second,
)

SOURCES = ["--base", "b", "--aligned", "a", "--out", "o"]
HELP = "see expo-serve delta --help"
WRONG: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "nothing": ([], ("expected create, verify or apply, found nothing", HELP)),
    "unknown action": (["pack", *SOURCES], ("expected create, verify or apply, found 'pack'", HELP)),
    "flags first": (["--base", "b", "create"], ("expected create, verify or apply, found '--base'", HELP)),
    "create without base": (["create", "--aligned", "a", "--out", "o"], ("delta create: --base is missing", HELP)),
    "create without aligned": (["create", "--base", "b", "--out", "o"], ("delta create: --aligned is missing", HELP)),
    "create without out": (["create", "--base", "b", "--aligned", "a"], ("delta create: --out is missing", HELP)),
    "create with an empty base": (["create", "--base", "", *SOURCES[2:]], ("delta create: --base is missing", HELP)),
    "create of a delta": (["create", *SOURCES, "--delta", "d"], ("delta create takes no --delta", HELP)),
    "verify without delta": (["verify", "--base", "b"], ("delta verify: --delta is missing", HELP)),
    "verify without base": (["verify", "--delta", "d"], ("delta verify: --base is missing", HELP)),
    "verify with out": (["verify", "--base", "b", "--delta", "d", "--out", "o"], ("delta verify takes no --out",)),
    "apply without out": (["apply", "--base", "b", "--delta", "d"], ("delta apply: --out is missing", HELP)),
    "apply with aligned": (["apply", *SOURCES, "--delta", "d"], ("delta apply takes no --aligned", HELP)),
    "unknown flag": (["create", *SOURCES, "--alpha", "1"], ("unrecognized arguments: --alpha 1", HELP)),
    "abbreviated flag": (["create", *SOURCES, "--unm", "copy"], ("unrecognized arguments: --unm copy", HELP)),
    "unmatched": (["create", *SOURCES, "--unmatched", "maybe"], ("--unmatched", "refuse", "copy")),
    "no size": (
        ["apply", "--base", "b", "--delta", "d", "--out", "o", "--max-shard-size", "x"],
        ("--max-shard-size", "5GB"),
    ),
    "out in no folder": (["create", *SOURCES[:4], "--out", "/no/such/o"], ("--out: /no/such does not exist",)),
    "out exists": (["create", *SOURCES[:4], "--out", "/tmp"], ("--out: /tmp exists",)),
}


@pytest.mark.parametrize(("arguments", "words"), WRONG.values(), ids=WRONG)
def test_wrong_call_is_refused(arguments: list[str], words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        delta.main(arguments)
    assert [word for word in words if word not in caught.value.message] == []
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nothing", "unknown action", "create without base", "out exists"])
def test_refusal_by_the_command_is_quick(name: str) -> None:
    arguments, words = WRONG[name]
    takes_less_than_half_a_second(["delta", *arguments], 2)
    refused("delta", *arguments, words=words)
    code, packages = imported("delta", *arguments)
    assert code == 2
    assert "expo_serve" in packages, "imports are not seen"
    assert not packages & HEAVY


def test_help_names_the_actions() -> None:
    takes_less_than_half_a_second(["delta", "--help"], 0)
    said = run_command("delta", "--help").stdout
    assert all(f"expo-serve delta {action}" in said for action in ("create", "verify", "apply"))


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
    words = ("wide is not the base that delta was made against (base)", "8 of 8 tensors differ", "give that base")
    printed = refused("delta", "verify", "--base", str(other), "--delta", str(packed), words=words)
    assert "the first lm_head.weight" in printed.splitlines()[-1] or "the first model." in printed.splitlines()[-1]


def test_checkpoint_is_no_packed_delta(pair: tuple[Path, Path]) -> None:
    words = (str(pair[1]), "is a full delta, which carries no checksums")
    refused("delta", "verify", "--base", str(pair[0]), "--delta", str(pair[1]), words=words)


SERVE: dict[str, tuple[list[str], str]] = {
    "both": (["--aligned", "a", "--delta", "d"], "--aligned and --delta are both given: leave one out"),
    "delta's revision": (["--aligned", "a", "--delta-revision", "r"], "--delta-revision is given, but --delta is not"),
    "aligned's revision": (
        ["--delta", "d", "--aligned-revision", "r"],
        "--aligned-revision is given, but --aligned is not",
    ),
    "empty delta": (["--delta", ""], "--delta is empty: expected folder or hub id"),
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
    return ["--base", str(sides[0]), "--aligned", str(sides[1])]


def test_full_disk_is_one_line_and_leaves_nothing(small_disk: Path, large: list[str]) -> None:
    out = small_disk / "out"
    words = (f"delta create: {small_disk}/.out.", "No space left on device; nothing was written to", str(out))
    printed = refused("delta", "create", *large, "--out", str(out), words=words, code=1)
    assert len(printed.splitlines()) == 1
    assert left_in(small_disk) == []


def test_full_disk_leaves_nothing_of_what_is_applied(small_disk: Path, large: list[str], tmp_path: Path) -> None:
    packed, out = tmp_path / "delta", small_disk / "out"
    assert delta.main(["create", *large, "--out", str(packed)]) == 0
    with pytest.raises(
        ExpoError, match=f"^delta apply: {small_disk}/.out.*No space left on device; nothing was written"
    ):
        delta.main(["apply", *large[:2], "--delta", str(packed), "--out", str(out)])
    assert left_in(small_disk) == []
