"""``expo-serve delta create|verify|apply``: pack the difference of two checkpoints, verify it, and apply it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from expo_serve.checkpoint.folder import open_checkpoint
from expo_serve.checkpoint.source import HubAccess
from expo_serve.cli.options import (
    REVISION_HELP,
    SUBFOLDER_HELP,
    add_allow_flag,
    add_hub_flags,
    add_rounding_flags,
    flag_of,
    normalise,
)
from expo_serve.cli.output import check_room, command_progress, new_folder, new_path, parse_size
from expo_serve.cli.pair_flag import add_pair_flag, put_pair
from expo_serve.cli.parser import Parser
from expo_serve.config import ExpoConfig, parse_config
from expo_serve.errors import UsageError, warn
from expo_serve.plan.delta import Delta, open_delta
from expo_serve.plan.packed import PackedDelta
from expo_serve.plan.pair import plan_pair
from expo_serve.plan.plan import Plan
from expo_serve.plan.prepare import locate, review
from expo_serve.plan.tokenizers import all_warnings

_EPILOG = """\
A packed delta holds only what differs, without loss, in a few percent of the checkpoint's size. Serve it with
  expo-serve --base B --delta D --alpha X

Exit codes: 0 success; 2 the command line or the sources are wrong, or a file is damaged; 1 values are not the
expected ones, or writing failed.
"""


def main(arguments: list[str]) -> int:
    """Create, verify or apply a delta; returns 0."""
    parser, actions = _parsers()
    action = arguments[0] if arguments else ""
    if action in ("-h", "--help"):
        parser.parse_args(["--help"])
    if action not in actions:
        found = f"found {action!r}" if action else "found nothing"
        raise UsageError(f"delta: expected create, verify or apply, {found}; see expo-serve delta --help")
    given, unknown = parser.parse_known_args([action, *normalise(arguments[1:], actions[action].known_flags())])
    said = _put_pair(given)
    _check(given, unknown)
    if said:
        print(said, file=sys.stderr, flush=True)
    given.run(given)
    return 0


def parser() -> Parser:
    """Return the parser of the command, with one subparser for each action."""
    return _parsers()[0]


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="expo-serve delta",
        description="Pack the difference of two checkpoints, verify a packed delta, or apply a delta to its base.",
        epilog=_EPILOG,
    )
    adder = parser.add_subparsers(title="actions", metavar="ACTION", dest="action")

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str, *required: str) -> Parser:
        action: Parser = adder.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        action.set_defaults(run=run, required=required)
        _add_source(action, "base", "the model before alignment")
        return action

    create = add("create", _create, "pack the difference of two checkpoints", "base", "aligned", "out")
    _add_source(create, "aligned", "the model after alignment")
    add_pair_flag(create, with_alpha=False)
    create.add_argument(
        "--unmatched", choices=("refuse", "copy"), default="refuse",
        help="tensors that only one checkpoint has: refuse the pair (default), or store aligned's and leave out base's",
    )  # fmt: skip
    verify = add("verify", _verify, "check every block of a packed delta against its base", "base", "delta")
    _add_source(verify, "delta", "the packed delta")
    _add_source(verify, "aligned", "the checkpoint that the delta must decode to, if it is to be compared too")
    apply = add("apply", _apply, "write the checkpoint that base and any kind of delta give", "base", "delta", "out")
    _add_source(apply, "delta", "a packed delta, a LoRA adapter or a full delta")
    apply.add_argument("--delta-subfolder", metavar="DIR", help=SUBFOLDER_HELP)
    apply.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file (default %(default)s)")
    for action in (create, apply):
        action.add_argument("--out", metavar="DIR", help="the folder to write; it must not exist")
    add_rounding_flags(apply)
    for action in (create, verify, apply):
        add_allow_flag(action)
        add_hub_flags(action)
    return parser, {"create": create, "verify": verify, "apply": apply}


def _add_source(parser: Parser, name: str, text: str) -> None:
    parser.add_argument(f"--{name}", metavar=name[0].upper(), help=f"{text}: folder or hub id")
    parser.add_argument(f"--{name}-revision", metavar="R", help=REVISION_HELP)


def _put_pair(given: argparse.Namespace) -> str | None:
    """Put the sources of ``--pair`` into their places; returns the line that says so, None without a pair."""
    values = {name.replace("_", "-"): value for name, value in vars(given).items()}
    said = put_pair(values, with_alpha=False)
    if said:
        given.base, given.aligned = values["base"], values["aligned"]
    return said


def _check(given: argparse.Namespace, unknown: list[str]) -> None:
    """Refuse a command line that cannot succeed before any source is looked for."""
    hint = f"see expo-serve delta {given.action} --help"
    if unknown:
        raise UsageError(f"delta {given.action} takes no {unknown[0]}; {hint}")
    for name in given.required:
        if not getattr(given, name):
            raise UsageError(f"delta {given.action}: --{name} is missing; {hint}")
    if "out" in given:
        new_path(given.out)
    if "max_shard_size" in given:
        parse_size(given.max_shard_size)


def _create(given: argparse.Namespace) -> None:
    out, hub = new_path(given.out), _hub(given)
    config = _config(given, aligned=given.aligned, aligned_revision=given.aligned_revision, unmatched=given.unmatched)
    base = open_checkpoint("base", locate("base", config, hub))
    aligned = open_checkpoint("aligned", locate("aligned", config, hub))
    plan = _reviewed(plan_pair(base, aligned, config, keep_left_out=True), config)
    with new_folder(out, "delta create") as folder, command_progress("delta create", plan.weight_bytes) as progress:
        check_room(out, "delta create", plan.weight_bytes, is_known=False)
        from expo_serve.write.companions import copy_companion_files
        from expo_serve.write.packed import write_packed_delta
        from expo_serve.write.provenance import write_card

        copy_companion_files(aligned.source, folder)
        write_card(folder, plan, None)
        write_packed_delta(plan, folder, progress)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"wrote {out}: {size / 1e6:,.1f} MB, {size / max(1, plan.weight_bytes):.1%} of {aligned.source.name}")


def _verify(given: argparse.Namespace) -> None:
    hub = _hub(given)
    delta, plan, _ = _open(given, hub)
    if not isinstance(delta, PackedDelta):
        raise UsageError(
            f"delta verify: {given.delta} is a {delta.format} delta, which carries no checksums; it can be applied "
            "or served"
        )
    aligned = None
    if given.aligned:
        config = _config(given, aligned=given.aligned, aligned_revision=given.aligned_revision)
        aligned = open_checkpoint("aligned", locate("aligned", config, hub))
    with command_progress("delta verify", plan.weight_bytes) as progress:
        from expo_serve.write.verify import verify_packed_delta

        verify_packed_delta(plan, aligned, progress)
    same = f", and decodes to {aligned.source.name}" if aligned else ""
    print(f"{given.delta} is intact, matches {plan.base.source.name}{same}")


def _apply(given: argparse.Namespace) -> None:
    out = new_path(given.out)
    _, plan, config = _open(given, _hub(given))
    with new_folder(out, "delta apply") as folder, command_progress("delta apply", plan.weight_bytes) as progress:
        check_room(out, "delta apply", plan.weight_bytes)
        from expo_serve.write.merged import write_checkpoint

        write_checkpoint(plan, config, folder, parse_size(given.max_shard_size), progress)
    print(f"wrote {out}")


def _open(given: argparse.Namespace, hub: HubAccess) -> tuple[Delta, Plan, ExpoConfig]:
    """Open the delta, and plan every tensor at alpha 0."""
    rounding = {key: value for key in ("rounding", "rounding_seed") if (value := getattr(given, key, None)) is not None}
    subfolder = getattr(given, "delta_subfolder", None)
    config = _config(
        given, delta=given.delta, delta_revision=given.delta_revision, delta_subfolder=subfolder, **rounding
    )
    base = open_checkpoint("base", locate("base", config, hub))
    delta = open_delta(locate("delta", config, hub))
    if isinstance(delta, PackedDelta):
        return delta, _reviewed(delta.plan(base, config, keep_left_out=True), config), config
    return delta, _reviewed(delta.plan(base, config), config), config


def _reviewed(plan: Plan, config: ExpoConfig) -> Plan:
    """Return the plan with its doubts allowed, and say all warnings."""
    reviewed = review(plan, config)
    for warning in all_warnings(reviewed):
        warn(warning)
    return reviewed


def _config(given: argparse.Namespace, **values: str | list[str] | bool | None) -> ExpoConfig:
    return parse_config(
        {
            "base": given.base,
            "base_revision": given.base_revision,
            "alpha": 0,
            "allow": given.allow,
            "allow_links": given.allow_links,
            "allow_pickle_index": bool(given.allow_pickle_index),
            **values,
        },
        name=flag_of,
    )


def _hub(given: argparse.Namespace) -> HubAccess:
    return HubAccess(given.hf_token, given.download_dir)
