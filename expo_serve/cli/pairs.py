"""``expo-serve pairs``: published pairs, the alphas that ExPO's authors found for them, and what to run."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from expo_serve.checkpoint.published import PublishedFiles, PublishedPair, PublishedPairs, find_pair, published_pairs
from expo_serve.cli.parser import Parser
from expo_serve.config import format_alpha

if TYPE_CHECKING:
    from rich.table import Table

_NO_ALPHA = "none"


def main(arguments: list[str]) -> int:
    """List the pairs, or print what to run for one; returns 0.

    Raises:
        UsageError: the command line is wrong, or there is no such pair.
    """
    given = parser().parse_args(arguments)
    published = published_pairs()
    if given.name is None:
        print(published.model_dump_json(indent=2)) if given.json else _list(published)
        return 0
    pair = find_pair(given.name, "pairs")
    if given.json:
        print(json.dumps({**pair.model_dump(mode="json"), "commands": commands(pair)}, indent=2))
    else:
        print("\n".join(_shown(pair, published)))
    return 0


def parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog="expo-serve pairs",
        description="List published pairs of checkpoints with the alphas that ExPO's authors found for them; with a "
        "name, print\nwhat to run. Nothing is asked of the hub.",
        epilog="Exit codes: 0 success; 2 the command line is wrong, or there is no pair of that name.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a pair: what to run, and what is known of its files")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser


def commands(pair: PublishedPair) -> dict[str, str]:
    """Return the command lines for a pair, by what they are for: ``serve``, ``short``, ``inspect`` and ``sweep``."""
    alpha = ["--alpha", "X" if pair.alpha is None else format_alpha(pair.alpha)]
    own_alpha = alpha if pair.alpha is None else []
    short = ["--pair", pair.name, *pair.access_flags]
    words = {
        "serve": ["--base", pair.base, "--aligned", pair.aligned, *pair.access_flags, *alpha],
        "short": [*short, *own_alpha],
        "inspect": ["inspect", *short, *own_alpha],
        "sweep": ["sweep", *short, "--prompts", "FILE.jsonl", "--reward", "vllm:REWARD_MODEL"],
    }
    return {use: shlex.join(["expo-serve", *line]) for use, line in words.items()}


def _list(published: PublishedPairs) -> None:
    """Print all pairs: as a table on a terminal, else a line each with tabs between the columns."""
    if not sys.stdout.isatty():
        print("\t".join(("pair", "alpha", "base", "aligned", "files of base", "files of aligned", "source")))
        for pair in published.pairs:
            formats = pair.base_files.text, pair.aligned_files.text
            print("\t".join((pair.name, _alpha(pair), pair.base, pair.aligned, *formats, pair.source)))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_table(published))
    for line in _legend(published):
        console.print(line, markup=False, soft_wrap=True)


def _table(published: PublishedPairs) -> Table:
    """Return a table with a row for each side, so that what folds on a narrow terminal stays in its place."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table

    columns = [Column("pair, source", overflow="fold"), Column("alpha", justify="right", no_wrap=True)]
    columns += [Column("base, aligned", overflow="fold"), Column("files", overflow="fold")]
    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for pair in published.pairs:
        table.add_row(pair.name, _alpha(pair), pair.base, pair.base_files.text)
        table.add_row(pair.source, "", pair.aligned, pair.aligned_files.text, end_section=True)
    return table


def _legend(published: PublishedPairs) -> Iterator[str]:
    yield f"alpha: chosen by {published.measured_by}; {_NO_ALPHA}: none was found that helps"
    yield (
        f"files: of the main branch, from {published.looked_up_in}, looked up on {published.looked_up}; PR: pull "
        "requests with safetensors"
    )
    yield "expo-serve pairs NAME prints what to run"


def _alpha(pair: PublishedPair) -> str:
    return _NO_ALPHA if pair.alpha is None else format_alpha(pair.alpha)


def _shown(pair: PublishedPair, published: PublishedPairs) -> Iterator[str]:
    """Yield the lines about one pair."""
    yield pair.name
    yield f"  base     {pair.base} ({pair.base_files.text})"
    yield f"  aligned  {pair.aligned} ({pair.aligned_files.text})"
    yield f"  alpha    {_alpha(pair)}: {_found(pair, published)}"
    yield f"  files    from {published.looked_up_in}, looked up on {published.looked_up}"
    yield ""
    lines = commands(pair)
    yield from _block("Serve it:", lines, "serve", "short")
    yield from _block("See what a load would do; only headers are read:", lines, "inspect")
    yield from _block("Measure which alpha suits your prompts:", lines, "sweep")
    yield from _help(pair)


def _found(pair: PublishedPair, published: PublishedPairs) -> str:
    if pair.alpha is None:
        return f"ExPO's authors found none that helps ({pair.source}); one of your own is needed"
    return f"what ExPO's authors found ({pair.source}) by {published.measured_by}"


def _block(title: str, lines: Mapping[str, str], *uses: str) -> Iterator[str]:
    yield title
    yield from (f"  {lines[use]}" for use in uses)


def _help(pair: PublishedPair) -> Iterator[str]:
    """Yield what is to be known of sides without safetensors, as far as they are known."""
    sides = {"base": pair.base_files, "aligned": pair.aligned_files}
    lines = [_help_with(side, there) for side, there in sides.items() if there.format == ".bin"]
    if any(there.format is None for there in sides.values()):
        lines.append("Where a side turns out to have .bin files only, the refusal names what helps.")
    if lines:
        yield ""
        yield from lines


def _help_with(side: str, there: PublishedFiles) -> str:
    if not there.conversions:
        return (
            f"{side} has .bin files only, and no pull request with safetensors is known: --allow-pickle-index finds "
            "the tensors in them and runs nothing."
        )
    return (
        f"{side} has .bin files only: pull request {max(there.conversions)} of its repository offers safetensors. Its "
        "owner has not merged it; --allow-pickle-index reads the .bin files instead, and runs nothing."
    )
