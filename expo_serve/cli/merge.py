"""``expo-serve merge --out DIR``: the numbers that a load gives, as a plain checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from expo_serve.cli.options import Options, add_source_flags, read_options
from expo_serve.cli.output import Advance, copy_side_files, new_folder, new_path, parse_size, progress
from expo_serve.cli.parser import Parser
from expo_serve.errors import UsageError
from expo_serve.plan.plan import Plan
from expo_serve.plan.prepare import prepare


def main(arguments: list[str]) -> int:
    """Merge; returns 0."""
    options, out, shard_bytes = _read(arguments)
    plan = prepare(options.config, options.hub)
    with new_folder(out, "merge") as folder, progress("merge", plan.weight_bytes) as advance:
        write_checkpoint(plan, folder, shard_bytes, advance)
    print(f"wrote {out}")
    return 0


def _read(arguments: list[str]) -> tuple[Options, Path, int]:
    parser = Parser(
        prog="expo-serve merge",
        description="Write the extrapolated checkpoint, with the aligned side's config and tokenizer.",
    )
    add_source_flags(parser)
    parser.add_argument("--out", metavar="DIR", help="the folder to write; it must not exist")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file (default 5GB)")
    options = read_options(parser, arguments)
    if options.unknown:
        raise UsageError(f"merge does not know {options.unknown[0]!r}; see expo-serve merge --help")
    return options, new_path(options.namespace.out), parse_size(options.namespace.max_shard_size)


def write_checkpoint(plan: Plan, folder: Path, shard_bytes: int, advance: Advance) -> None:
    """Write a plan's result into a folder, with its config and tokenizer.

    Raises:
        ExpoError: a source cannot be read, or a value is not finite.
        OSError: the folder cannot be written to.
    """
    from expo_serve.write.merged import save

    copy_side_files(Path(plan.model.path), folder)
    if plan.tokenizer:
        copy_side_files(
            Path(plan.tokenizer.path), folder, leave_out=("adapter_config.json", "config.json", "README.md")
        )
    if plan.overrides:
        _override(folder / "config.json", plan)
    save(list(plan.tensors.values()), folder, shard_bytes, advance)


def _override(file: Path, plan: Plan) -> None:
    config = json.loads(file.read_bytes())
    for key, value in plan.overrides.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(config, indent=2) + "\n")
