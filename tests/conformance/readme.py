"""The tables of families and combinations in docs/models.md, made from the tables that the tests run.

``python -m tests.conformance.readme`` writes them into the page; a test checks that they are up to date.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from tests.conformance.checkpoints import has_transformers_class
from tests.conformance.combinations import COMBINATIONS
from tests.conformance.families import FAMILIES, MULTIMODAL, POOLING, TEXT
from tests.conformance.family import Family
from tests.conformance.left_out import LEFT_OUT

PAGE = Path(__file__).parents[2] / "docs/models.md"
BEGIN, END = "<!-- made by tests/conformance/readme.py: begin -->\n", "<!-- end -->\n"
_GROUPS = (("text", TEXT), ("pooling, reward, classification", POOLING), ("multimodal", MULTIMODAL))


def tables() -> str:
    """Return everything between the two marks."""
    return "\n".join([_summary(), *_families(), "", *_left_out(), "", *_combinations(), ""])


def _summary() -> str:
    built = {family.architecture for family in FAMILIES}
    run = sum(not family.not_run for family in FAMILIES)
    straight = sum(not family.materialized for family in FAMILIES)
    return (
        f"{len(FAMILIES)} tiny models of {len(built)} architectures are loaded on CPU by plain vLLM 0.32 from a "
        "merged checkpoint\nand by expo-serve from the pair: all parameters and buffers have the same bits, and "
        f"the {run} that run give the same greedy tokens.\nIn {straight} every byte is combined straight into the "
        "parameter; elsewhere a number in parentheses is the number of\ntensors that are materialised first, because "
        "the model computes with them. The checkpoints are those that transformers\nwrites, with the names of the "
        "hub; where it has no class (\\*), the names are those that vLLM's own model loads.\n\n"
        "## Families\n"
    )


def _families() -> Iterator[str]:
    yield "| kind | compared | architectures |"
    yield "|---|---|---|"
    for kind, families in _GROUPS:
        for not_run, group in groupby(sorted(families, key=_reason), key=_reason):
            compared = f"bits ({not_run})" if not_run else "bits, tokens"
            yield f"| {kind} | {compared} | {', '.join(_described(family) for family in group)} |"


def _reason(family: Family) -> str:
    return family.not_run


def _described(family: Family) -> str:
    details = [family.layout, f"{family.materialized}" if family.materialized else ""]
    text = ", ".join(detail for detail in details if detail)
    mark = "" if has_transformers_class(family) else "\\*"
    return f"{family.architecture}{mark} ({text})" if text else f"{family.architecture}{mark}"


def _left_out() -> Iterator[str]:
    yield f"## Not tried, or not possible here: {len(LEFT_OUT)} architectures"
    yield ""
    yield "| what was seen (plain vLLM on CPU, tiny configs) | architectures |"
    yield "|---|---|"
    for reason, count in Counter(LEFT_OUT.values()).most_common():
        names = [name for name, given in LEFT_OUT.items() if given == reason]
        yield f"| {reason} | {_some(names, count)} |"


def _some(names: Sequence[str], count: int, most: int = 12) -> str:
    listed = ", ".join(names[:most])
    return listed if count <= most else f"{listed} and {count - most} more (`tests/conformance/left_out.py`)"


def _combinations() -> Iterator[str]:
    yield "## Combinations"
    yield ""
    yield "| combination | flags | compared with plain vLLM | |"
    yield "|---|---|---|---|"
    for one in COMBINATIONS:
        flags = f"`{one.example}`" if one.flags else ""
        yield f"| {one.name} | {flags} | {one.compared} | {one.how} |"


def written(text: str) -> str:
    """Return the page's text with up-to-date tables."""
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{PAGE.name} lacks the marks {BEGIN.strip()!r} and {END.strip()!r}")
    return f"{before}{BEGIN}{tables()}{END}{after}"


def _main(files: Iterable[Path]) -> None:
    for file in files:
        file.write_text(written(file.read_text()))


if __name__ == "__main__":
    _main([PAGE])
