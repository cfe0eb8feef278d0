"""Prints an inspection as tables."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Column, Table

from expo_serve.cli.inspection import Inspection
from expo_serve.config import format_alpha
from expo_serve.errors import MAX_DETAILS
from expo_serve.measure.measurement import MeasuredPart, Measurement


def show(inspection: Inspection) -> None:
    """Print an inspection on standard output; the width of the terminal never cuts a path or a name."""
    console = Console(highlight=False)
    if inspection.sources:
        console.print(_sources(inspection))
    if inspection.memory:
        console.print(_plan(inspection))
    if inspection.measurement:
        console.print(_LEGEND.format(format_alpha(inspection.alpha)), markup=False, soft_wrap=True)
        console.print(_measured(inspection.measurement))
        console.print(inspection.measurement.verdict.text, markup=False, soft_wrap=True)
        for remark in inspection.measurement.verdict.remarks:
            console.print(f"note: {remark}", markup=False, soft_wrap=True)
    for line in _remarks(inspection):
        console.print(line, markup=False, soft_wrap=True)


def _remarks(inspection: Inspection) -> Iterator[str]:
    """Yield warnings and refusals as lines, outside the tables, so that nothing is cut."""
    for warning in inspection.warnings:
        yield f"warning: {warning}"
    for refusal in inspection.refusals:
        yield f"refused: {refusal.message}"
        for line in refusal.details[:MAX_DETAILS]:
            yield f"  {line}"
        if len(refusal.details) > MAX_DETAILS:
            yield f"  ... and {len(refusal.details) - MAX_DETAILS} more"


def _sources(inspection: Inspection) -> Table:
    """Return a table with one column per source: a row per source would be too wide for its name and commit."""
    table = Table("source", *(Column(side, overflow="fold") for side in inspection.sources))
    sides = inspection.sources.values()
    rows = {
        "name": [source.name for source in sides],
        **({"kind": [source.kind or "checkpoint" for source in sides]} if any(source.kind for source in sides) else {}),
        "revision": [source.revision or "-" for source in sides],
        "fingerprint": [source.fingerprint or "-" for source in sides],
        "files": [str(source.files) for source in sides],
        "tensors": [str(source.tensors) for source in sides],
        "size": [decimal(source.bytes) for source in sides],
        "dtypes": [", ".join(source.dtypes) or "-" for source in sides],
    }
    for key, values in rows.items():
        table.add_row(key, *(escape(value) for value in values))
    return table


_LEGEND = (
    "Measured: shares of values that are the same on both sides, and 1, 2, ... units in the last place apart; size of "
    "the step; effective alpha for {} by rounding"
)


def _measured(measurement: Measurement) -> Table:
    """Return a table of groups and layers: how far the sides are apart, and what arrives of alpha."""
    heads = ["values", "same", *measurement.total.units, "step"]
    heads += list(measurement.effective_alpha)
    columns = (Column(head, justify="right", no_wrap=True) for head in heads)
    first = Column("", no_wrap=True)
    table = Table(first, *columns, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    parts: list[tuple[str, MeasuredPart]] = [("all", measurement.total)]
    parts += [(group.group, group) for group in measurement.groups]
    parts += [(f"layer {layer.layer}", layer) for layer in measurement.layers]
    for name, part in parts:
        shares = [f"{share:.1%}" for share in (part.share_unchanged, *part.units.values())]
        step = "-" if part.step is None else f"{part.step:.2g}"
        arrived = ["-" if value is None else f"{value:.3g}" for value in part.effective_alpha.values()]
        table.add_row(name, _count(part.values), *shares, step, *arrived)
    return table


def _count(count: int) -> str:
    """Return a number of values in short: ``1.1 G``."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _plan(inspection: Inspection) -> Table:
    assert inspection.memory is not None
    sizes = inspection.memory
    reads = inspection.read_bytes_per_rank
    table = Table("plan", Column("", overflow="fold"))
    rows = {
        "alpha": format_alpha(inspection.alpha),
        "rounding": f"{inspection.rounding}, seed {inspection.rounding_seed}"
        if inspection.rounding == "dithered"
        else f"{inspection.rounding} (the bits of a checkpoint merged by other tools)",
        "alpha rules": ", ".join(inspection.alpha_rules) or "-",
        "served as": inspection.served_model_name,
        "tensors": ", ".join(f"{count} {kind}" for kind, count in inspection.counts.items()),
        "by alpha": ", ".join(f"{count} at {alpha}" for alpha, count in inspection.alphas.items()) or "-",
        "unmatched": f"{len(inspection.copied_unmatched)} copied, {len(inspection.ignored_base)} of base ignored",
        **({"unchanged": f"{len(inspection.unchanged)} not named by the delta"} if inspection.unchanged else {}),
        "tokenizer": inspection.tokenizer or "none",
        "chat template": inspection.chat_template or "none",
        f"read per rank (of {inspection.tensor_parallel_size})": " + ".join(
            f"{decimal(size)} of {side}" for side, size in reads.items()
        ),
        "weights": f"{decimal(sizes.weight_bytes_per_rank)} per rank, {decimal(sizes.weight_bytes)} in total",
        "host memory available": decimal(sizes.available_host_bytes)
        + ("" if sizes.fits_host else " (too little for a CPU server)"),
    }
    for key, value in rows.items():
        table.add_row(key, escape(str(value)))
    return table
