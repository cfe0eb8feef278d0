"""The tables of docs/alpha.md, from the figures of loadtests.rounding.

python -m loadtests.rounding_table      # writes them into the page
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loadtests.results import RESULTS, read, table

PAGE = Path(__file__).resolve().parents[1] / "docs/alpha.md"
_BEGIN, _END = "<!-- figures -->", "<!-- end of figures -->"
KINDS = {
    "demo": "The demo's pair: DPO by LoRA, merged, bf16",
    "all": "A short DPO run of all parameters, bf16",
    "fp16": "The demo's pair in fp16",
    "large": "The demo's step ten times as large, bf16",
    "adapter": "The demo's adapter, served as a LoRA delta over a bf16 base",
}
"""Title of each kind of pair."""


def _shown(found: dict[str, float], form: str) -> str:
    return f"{found['value']:{form}} ({found['low']:{form}} to {found['high']:{form}})"


def _rows(figures: dict[str, Any]) -> list[list[str]]:
    rows = []
    for alpha in dict.fromkeys(key.split()[0] for key in figures):
        both = [figures[f"{alpha} {rounding}"] for rounding in ("dithered", "nearest")]
        weights = [f"{one['share_in_weights']:.3f}" if "share_in_weights" in one else "-" for one in both]
        logits = [_shown(one["share_in_logits"], ".2f") for one in both]
        rows.append([alpha, *weights, *logits, *(_shown(one["kl"], ".1e") for one in both)])
    return rows


def written(results: Path = RESULTS) -> str:
    """The tables of all kinds."""
    parts = []
    heads = [
        f"{what}, {rounding}"
        for what in ("share in weights", "in logits", "KL")
        for rounding in ("dithered", "nearest")
    ]
    for kind, title in KINDS.items():
        figures = read("rounding", results)[kind]
        figures.pop("machine", None)
        parts += [f"{title}:", "", table(["alpha", *heads], _rows(figures)), ""]
    return "\n".join(parts)


def page(text: str, tables: str) -> str:
    """The page's text with these tables."""
    before, _, rest = text.partition(_BEGIN)
    return f"{before}{_BEGIN}\n\n{tables}\n{_END}{rest.partition(_END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), written()))
