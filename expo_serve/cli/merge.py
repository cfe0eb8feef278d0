"""``expo-serve merge --out DIR``: write the weights that a load would compute as a plain checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from expo_serve.cli.options import Options, add_source_flags, read_options
from expo_serve.cli.output import check_room, command_progress, new_folder, new_path, parse_size
from expo_serve.cli.parser import Parser
from expo_serve.config import parse_alpha
from expo_serve.errors import UsageError, warn
from expo_serve.plan.prepare import prepare
from expo_serve.plan.tokenizers import all_warnings
from expo_serve.report import EffectiveAlpha, alpha_warnings


def main(arguments: list[str]) -> int:
    """Merge; returns 0."""
    options, out, shard_bytes = _read(arguments)
    plan = prepare(options.config, options.hub)
    for warning in all_warnings(plan):
        warn(warning)
    with new_folder(out, "merge") as folder, command_progress("merge", plan.weight_bytes) as progress:
        check_room(out, "merge", plan.weight_bytes)
        from expo_serve.measure.sample import Sample
        from expo_serve.write.merged import write_checkpoint

        sample = Sample(1, options.config.how_to_round)
        write_checkpoint(plan, options.config, folder, shard_bytes, progress, sample)
    effective = {alpha: sample.effective_alpha(parse_alpha(alpha)) for alpha in plan.alphas}
    for warning in alpha_warnings(effective, options.config.rounding):
        warn(warning)
    print(f"wrote {out}: {_said(effective)}, rounding {options.config.rounding}")
    return 0


def _said(effective: Mapping[str, EffectiveAlpha]) -> str:
    """Return each alpha beside what arrived of it."""
    found = ((alpha, one.value) for alpha, one in effective.items())
    parts = (f"alpha {alpha} (effective {value:.4g})" for alpha, value in found if value is not None)
    return ", ".join(parts) or "nothing changed"


def parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog="expo-serve merge",
        description="Write the extrapolated checkpoint, with the config and tokenizer of the aligned model.",
        epilog="Exit codes: 0 success; 2 the command line or the sources are wrong; 1 a value is NaN or infinite, or "
        "writing failed.",
    )
    add_source_flags(parser)
    parser.add_argument("--out", metavar="DIR", help="the folder to write; it must not exist")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file (default %(default)s)")
    return parser


def _read(arguments: list[str]) -> tuple[Options, Path, int]:
    options = read_options(parser(), arguments)
    if options.unknown:
        raise UsageError(f"merge does not know {options.unknown[0]!r}; see expo-serve merge --help")
    return options, new_path(options.namespace.out), parse_size(options.namespace.max_shard_size)
