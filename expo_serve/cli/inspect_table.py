"""An inspection as tables for people."""

from __future__ import annotations

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from expo_serve.config import format_alpha
from expo_serve.errors import MAX_DETAILS
from expo_serve.report import Inspection


def show(inspection: Inspection) -> None:
    """Print an inspection on standard output."""
    console = Console(highlight=False)
    console.print(_sources(inspection))
    if inspection.memory:
        console.print(_plan(inspection))
    for warning in inspection.warnings:
        console.print(f"warning: {escape(warning)}")
    for refusal in inspection.refusals:
        console.print(f"refused: {escape(refusal.message)}")
        for line in refusal.details[:MAX_DETAILS]:
            console.print(f"  {escape(line)}")
        if len(refusal.details) > MAX_DETAILS:
            console.print(f"  ... and {len(refusal.details) - MAX_DETAILS} more")


def _sources(inspection: Inspection) -> Table:
    table = Table("source", "name", "revision", "fingerprint", "files", "tensors", "size", "dtypes")
    for side, source in inspection.sources.items():
        table.add_row(
            side, source.name, source.revision or "-", source.fingerprint, str(source.files),
            str(source.tensors), decimal(source.bytes), ", ".join(source.dtypes),
        )  # fmt: skip
    return table


def _plan(inspection: Inspection) -> Table:
    assert inspection.memory is not None
    room = inspection.memory
    reads = inspection.read_bytes_per_rank
    table = Table("plan", "")
    rows = {
        "alpha": format_alpha(inspection.alpha),
        "alpha rules": ", ".join(inspection.alpha_rules) or "-",
        "served as": inspection.served_model_name,
        "tensors": ", ".join(f"{count} {kind}" for kind, count in inspection.counts.items()),
        "by alpha": ", ".join(f"{count} at {alpha}" for alpha, count in inspection.alphas.items()) or "-",
        "unmatched": f"{len(inspection.copied_unmatched)} copied, {len(inspection.ignored_base)} of base ignored",
        "tokenizer": inspection.tokenizer or "none",
        "chat template": inspection.chat_template or "none",
        f"to read, each of {inspection.tensor_parallel_size} ranks": " + ".join(
            f"{decimal(size)} of {side}" for side, size in reads.items()
        ),
        "weights": f"{decimal(room.weight_bytes_per_rank)} a rank, {decimal(room.weight_bytes)} in all",
        "host memory there": decimal(room.available_host_bytes)
        + ("" if room.fits_host else " (too little for a CPU server)"),
    }
    for key, value in rows.items():
        table.add_row(key, escape(str(value)))
    return table
