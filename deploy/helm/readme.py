"""Writes the tables of values into the chart's README from the comments in values.yaml.

A comment that starts with ``# --`` documents the key below it. ``python deploy/helm/readme.py`` renews the README.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "expo-serve"
BEGIN, END = "<!-- made by deploy/helm/readme.py: begin -->\n", "<!-- end -->"


def rows(text: str) -> Iterator[tuple[str, Any, str]]:
    """Key, default and description of every documented value, in the file's order.

    Raises:
        ValueError: a key that holds no map has no description.
    """
    root = yaml.compose(text)
    assert root is not None
    yield from _rows(root, yaml.safe_load(text), text.splitlines(), "")


def _rows(node: yaml.Node, values: dict[str, Any], lines: list[str], prefix: str) -> Iterator[tuple[str, Any, str]]:
    for key, value in node.value:
        description = _comment(lines, key.start_mark.line)
        name = f"{prefix}{key.value}"
        if description is not None:
            yield name, values[key.value], description
        elif isinstance(value, yaml.MappingNode) and value.value:
            yield from _rows(value, values[key.value], lines, f"{name}.")
        else:
            raise ValueError(f"values.yaml: {name} has no comment that starts with '# --'")


def _comment(lines: list[str], line: int) -> str | None:
    """The comment right above a line, if it is one for readers of the README."""
    above: list[str] = []
    while line > 0 and lines[line - 1].lstrip().startswith("# "):
        line -= 1
        above.insert(0, lines[line].strip().removeprefix("# "))
        if above[0].startswith("-- "):
            return " ".join(above).removeprefix("-- ")
    return None


def table() -> str:
    """The table of all values."""
    lines = ["| value | default | |", "|---|---|---|"]
    for name, default, description in rows((CHART / "values.yaml").read_text()):
        lines.append(f"| `{name}` | `{json.dumps(default)}` | {description.replace('|', '&#124;')} |")
    return "\n".join(lines) + "\n"


def renewed(readme: str) -> str:
    """The README with the table of now."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    path = CHART / "README.md"
    path.write_text(renewed(path.read_text()))
