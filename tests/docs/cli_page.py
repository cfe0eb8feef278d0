"""The command-line reference docs/cli.md, made from the parsers of the commands.

``python -m tests.docs.cli_page`` writes it; a test checks that it is up to date.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from expo_serve.cli.main import main

PAGE = Path(__file__).parents[2] / "docs/cli.md"
COMMANDS = ("", "inspect", "merge", "delta", "delta create", "delta verify", "delta apply", "probe", "pairs", "sweep")
_HEAD = """\
# Command line

<!-- Made by `python -m tests.docs.cli_page` from the parsers. Do not edit. -->

Flags of expo-serve cannot be abbreviated. Underscores are accepted for hyphens, and a value may begin with a minus sign
(`--alpha -0.5`).
"""


class _Shown(Exception):
    """A parser was asked for its help."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """Return the parser whose help ``expo-serve COMMAND --help`` prints."""
    found: list[argparse.ArgumentParser] = []

    def keep(parser: argparse.ArgumentParser, file: object = None) -> None:
        found.append(parser)
        raise _Shown

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with patch.object(argparse.ArgumentParser, "print_help", keep):
            main([*command.split(), "--help"])
    except _Shown:
        pass
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return found[0]


def flags_of(command: str) -> set[str]:
    """Return every flag that a command takes."""
    return set(parser_of(command)._option_string_actions)


def written() -> str:
    """Return the page's text."""
    parsers = {parser.prog: parser for parser in map(parser_of, COMMANDS)}
    shown: dict[str, str] = {}
    sections = [line for parser in parsers.values() for line in _section(parser, shown)]
    return "\n".join([_HEAD, *sections]).rstrip() + "\n"


def _section(parser: argparse.ArgumentParser, shown: dict[str, str]) -> Iterator[str]:
    """Yield the lines of one command; a table that ``shown`` has is linked instead of repeated."""
    yield f"## {parser.prog}"
    yield ""
    if parser.description:
        yield from (parser.description, "")
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        table = "\n".join(row for action in actions for row in _rows(action, parser))
        if table in shown:
            yield from (f"The flags of [{shown[table]}](#{_anchor(shown[table])}).", "")
        elif table:
            title = shown[table] = f"{parser.prog}: {group.title}"
            yield from (f"### {title}", "", "| flag | value | meaning |", "|---|---|---|", table, "")
    if parser.epilog:
        yield from ("```text", parser.epilog.rstrip(), "```", "")


def _anchor(title: str) -> str:
    return title.replace(":", "").replace(" ", "-")


def _rows(action: argparse.Action, parser: argparse.ArgumentParser) -> Iterator[str]:
    if isinstance(action, argparse._SubParsersAction):
        yield from (f"| `{choice.dest}` | | {choice.help} |" for choice in action._choices_actions)
    elif not isinstance(action, argparse._HelpAction):
        flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
        text = (action.help or "") % {**vars(action), "prog": parser.prog}
        yield f"| {flags} | {_value(action)} | {text}{', required' if action.required else ''} |".replace("|  |", "| |")


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices:
        return " or ".join(f"`{choice}`" for choice in action.choices)
    value = f"`{action.metavar or action.dest.upper()}`"
    return f"[{value}]" if action.nargs == "?" else value


if __name__ == "__main__":
    PAGE.write_text(written())
