"""``expo-serve pairs`` and the flag ``--pair``."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from expo_serve.checkpoint.published import find_pair, published_pairs
from expo_serve.cli import inspect, sweep
from expo_serve.cli.options import Options, add_source_flags, read_options
from expo_serve.cli.pairs import commands
from expo_serve.cli.parser import Parser
from expo_serve.errors import UsageError
from tests.command import refused, run_here
from tests.test_cli_speed import HEAVY, imported

PAIRS = published_pairs().pairs
NONE = "Mistral-7B-Base-SFT-KTO"
BASE, ALIGNED = "HuggingFaceH4/mistral-7b-sft-beta", "HuggingFaceH4/zephyr-7b-beta"


def read(*arguments: str) -> Options:
    """Parse a command line of the server."""
    parser = Parser(prog="expo-serve")
    add_source_flags(parser)
    return read_options(parser, arguments)


def yaml_file(folder: Path, **content: object) -> str:
    """A ``--config`` file."""
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


def test_list_is_a_line_a_pair_where_no_terminal_is() -> None:
    lines = run_here("pairs").stdout.splitlines()
    head, *rows = [line.split("\t") for line in lines]
    assert head == ["pair", "alpha", "base", "aligned", "files of base", "files of aligned", "source"]
    assert [row[0] for row in rows] == [pair.name for pair in PAIRS]
    found = {row[0]: row[1:] for row in rows}
    assert found["zephyr-7b-beta"][:3] == ["0.1", BASE, ALIGNED]
    assert found[NONE][0] == "none"
    assert found["tulu-2-dpo-7b"][3:5] == [".bin, PR 2", ".bin, PR 2, 4"]


@pytest.mark.parametrize("columns", [120, 200])
def test_list_is_a_table_on_a_terminal(columns: int) -> None:
    rows = [line.split() for line in on_terminal(columns, "pairs").splitlines()]
    for pair in PAIRS:
        alpha = "none" if pair.alpha is None else str(pair.alpha)
        first = rows.index([pair.name, alpha, pair.base, *pair.base_files.text.split()])
        assert pair.aligned in rows[first + 1]
        assert rows[first + 1][:1] == pair.source.split()[:1]


def test_list_fits_a_narrow_terminal() -> None:
    """But for the remarks below the table, which the terminal wraps."""
    text = on_terminal(60, "pairs")
    table, _, remarks = text.partition("\nalpha: chosen by ")
    assert max(map(len, table.split("\n"))) == 60
    assert [line.split(":")[0] for line in remarks.splitlines()[1:2]] == ["files"]


def on_terminal(columns: int, *arguments: str) -> str:
    """What the command prints on a terminal of that width."""
    main, other = pty.openpty()
    env = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "expo_serve", *arguments], stdout=other, stderr=subprocess.STDOUT, env=env
    ) as process:
        os.close(other)
        text = b""
        while True:
            try:
                piece = os.read(main, 65536)
            except OSError:  # Linux: the other end is closed
                break
            text += piece
    os.close(main)
    assert process.returncode == 0, text
    return re.sub(r"\x1b\[\d*m", "", text.decode()).replace("\r\n", "\n")


def test_json_is_the_data() -> None:
    found = json.loads(run_here("pairs", "--json").stdout)
    assert found == published_pairs().model_dump(mode="json")
    assert [pair["name"] for pair in found["pairs"]] == [pair.name for pair in PAIRS]


@pytest.mark.parametrize("name", [pair.name for pair in PAIRS])
def test_a_pair_shows_its_data_and_its_commands(name: str) -> None:
    pair = find_pair(name, "x")
    result = run_here("pairs", name)
    assert result.returncode == 0
    text = result.stdout
    for there in (pair.base, pair.aligned, pair.base_files.text, pair.aligned_files.text, pair.source):
        assert there in text
    assert [line.strip() for line in text.splitlines() if line.startswith("  expo-serve")] == list(
        commands(pair).values()
    )
    for side, files in (("base", pair.base_files), ("aligned", pair.aligned_files)):
        assert (f"{side} has .bin files only" in text) == (files.format == ".bin")
    assert ("found none that helps" in text) == (pair.alpha is None)


@pytest.mark.parametrize("name", [pair.name for pair in PAIRS])
def test_commands_are_read_as_what_they_say(name: str) -> None:
    """By the commands' own parsers; the short form is the long one."""
    pair = find_pair(name, "x")
    lines = {use: shlex.split(line.replace(" X", " 0.7"))[1:] for use, line in commands(pair).items()}
    serve = read(*lines["serve"]).config
    assert (serve.base, serve.aligned, serve.alpha) == (pair.base, pair.aligned, 0.7 if name == NONE else pair.alpha)
    assert read(*lines["short"]).config == serve
    assert read_options(inspect.parser(), lines["inspect"][1:]).config == serve
    swept = read_options(sweep.parser(), lines["sweep"][1:], needs_alpha=False)
    assert swept.config == serve.model_copy(update={"alpha": 0.0})
    assert swept.unknown == []


def test_commands_for_programs() -> None:
    found = json.loads(run_here("pairs", "tulu-2-dpo-7b", "--json").stdout)
    assert found["commands"]["short"] == (
        "expo-serve --pair tulu-2-dpo-7b --base-revision refs/pr/2 --aligned-revision refs/pr/4"
    )
    assert found["aligned_files"] == {"format": ".bin", "conversions": [2, 4], "note": ""}


@pytest.mark.parametrize("command", [["pairs", "zephyr-7b-betta"], ["--pair", "zephyr-7b-betta"]])
def test_an_unknown_pair_is_refused_with_near_ones(command: list[str]) -> None:
    refused(*command, words=("zephyr-7b-betta", "did you mean zephyr-7b-beta", "expo-serve pairs"))


@pytest.mark.parametrize("command", [["pairs", "one", "two"], ["pairs", "--base", "b"]])
def test_a_wrong_command_line_is_refused(command: list[str]) -> None:
    refused(*command, words=(command[-1], "expo-serve pairs --help"))


def test_list_imports_nothing_heavy() -> None:
    code, found = imported("pairs")
    assert code == 0
    assert not found & (HEAVY | {"rich", "huggingface_hub"})


def test_pair_gives_base_aligned_and_alpha(capsys: pytest.CaptureFixture[str]) -> None:
    options = read("--pair", "zephyr-7b-beta", "--port", "1")
    assert options.config == read("--base", BASE, "--aligned", ALIGNED, "--alpha", "0.1").config
    assert options.unknown == ["--port", "1"]
    printed = capsys.readouterr()
    assert printed.err == (
        f"expo-serve: --pair zephyr-7b-beta: base {BASE}, aligned {ALIGNED}, alpha 0.1 as ExPO's authors found "
        "(arXiv 2404.16792v5, Table 7)\n"
    )
    assert printed.out == ""


def test_a_given_alpha_wins(capsys: pytest.CaptureFixture[str]) -> None:
    assert read("--pair", "zephyr-7b-beta", "--alpha", "-0.4").config.alpha == -0.4
    assert "for which ExPO's authors found alpha 0.1 (arXiv" in capsys.readouterr().err
    assert read("--pair", NONE, "--alpha", "0.2").config.alpha == 0.2
    assert "ExPO's authors found no alpha that helps (arXiv" in capsys.readouterr().err


def test_a_pair_without_an_alpha_needs_one() -> None:
    for command in ([], ["inspect"], ["merge", "--out", "/nowhere/x"]):
        refused(*command, "--pair", NONE, words=(NONE, "no alpha that helps", "Table 6", "--alpha"))


@pytest.mark.parametrize("flag", ["base", "aligned", "delta"])
def test_a_pair_beside_its_sides_is_refused(flag: str, tmp_path: Path) -> None:
    words = ("--pair", f"--{flag}", "both given")
    refused("--pair", "zephyr-7b-beta", f"--{flag}", "x", words=words)
    with pytest.raises(UsageError, match=f"--pair and --{flag} are both given"):
        read("--pair", "zephyr-7b-beta", "--config", yaml_file(tmp_path, **{flag: "x"}))
    with pytest.raises(UsageError, match=f"--pair and --{flag} are both given"):
        read(f"--{flag}", "x", "--config", yaml_file(tmp_path, pair="zephyr-7b-beta"))


def test_pair_in_a_file(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, pair="zephyr-7b-beta", port=8000)
    options = read("--config", file)
    assert (options.config.base, options.config.alpha) == (BASE, 0.1)
    assert options.file_options == {"port": 8000}
    assert read("--config", file, "--pair", "zephyr-7b-alpha").config.alpha == 0.3
    assert read("--config", file, "--alpha", "2").config.alpha == 2
    with pytest.raises(UsageError, match="no published pair is named '7'"):
        read("--config", yaml_file(tmp_path, pair=7))


def test_other_flags_hold_beside_a_pair() -> None:
    config = read("--pair", "tulu-2-dpo-7b", "--base-revision", "refs/pr/2", "--alpha-rule", "lm_head=0").config
    assert (config.base_revision, config.aligned_revision, config.alpha_for("lm_head.weight")) == ("refs/pr/2", None, 0)
    with pytest.raises(UsageError, match="--delta-revision is given, but --delta is not"):
        read("--pair", "tulu-2-dpo-7b", "--delta-revision", "r")


@pytest.mark.parametrize(
    ("given", "is_said"),
    [
        ([], True),
        (["--base-revision", "refs/pr/2"], False),
        (["--aligned_revision=x"], False),
        (["--allow-pickle-index"], False),
    ],
)
def test_what_helps_a_side_without_safetensors_is_said(
    given: list[str], is_said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = read("--pair", "tulu-2-dpo-7b", *given).config
    line = capsys.readouterr().err
    assert line.endswith(": add --base-revision refs/pr/2 --aligned-revision refs/pr/4\n") == is_said
    assert line.count("\n") == 1
    if not given:  # A pull request is another's work: it is never chosen silently.
        assert (config.base_revision, config.aligned_revision) == (None, None)


def test_nothing_is_said_of_a_command_line_that_is_refused() -> None:
    assert "authors" not in refused("--pair", "zephyr-7b-beta", "--alpha", "x", words=("--alpha",))


@pytest.mark.parametrize("command", [[], ["inspect"], ["merge", "--out", "NEW"], ["delta", "create", "--out", "NEW"]])
def test_every_command_that_takes_a_pair_of_sources_takes_a_published_one(command: list[str], tmp_path: Path) -> None:
    """Refused by the search for the first source in an empty cache, after the pair was put in its place."""
    words = [str(tmp_path / "new") if word == "NEW" else word for word in command]
    result = subprocess.run(
        [sys.executable, "-m", "expo_serve", *words, "--pair", "zephyr-7b-beta"],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 2
    said, *_, last = result.stderr.splitlines()
    assert said.startswith(f"expo-serve: --pair zephyr-7b-beta: base {BASE}, aligned {ALIGNED}")
    assert ("alpha 0.1" in said) == ("delta" not in command)
    assert "refused for 2 reasons" in last or f"'{BASE}': no such folder, not in the hub cache" in last


def test_delta_create_takes_a_pair_in_place_of_its_sides(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "new")]
    refused("delta", "create", "--pair", NONE, "--base", "b", *out, words=("--pair", "--base", "both given"))
    refused("delta", "verify", "--pair", NONE, "--delta", "d", words=("delta verify takes no --pair",))
    refused("delta", "create", *out, words=("--base is missing",))


def test_commands_that_choose_alpha_take_none(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, alpha=0.7)
    sources = ["--base", "b", "--aligned", "a"]
    assert read_options(sweep.parser(), [*sources, "--config", file], needs_alpha=False).config.alpha == 0
    for given in (["--alpha", "1"], ["--alpha=1"]):
        with pytest.raises(UsageError, match="--alpha: this command chooses alpha itself"):
            read_options(sweep.parser(), [*sources, *given], needs_alpha=False)
