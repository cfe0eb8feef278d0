"""``expo-serve delta create|verify|apply``: pack the difference of two checkpoints, check it, and undo it."""

from __future__ import annotations

import argparse
from pathlib import Path

from expo_serve.checkpoint.folder import open_checkpoint
from expo_serve.checkpoint.source import HubAccess, find_source
from expo_serve.cli.options import normalise
from expo_serve.cli.output import copy_side_files, new_folder, new_path, parse_size, progress
from expo_serve.cli.parser import Parser
from expo_serve.config import ExpoConfig, parse_config
from expo_serve.errors import UsageError
from expo_serve.plan.delta import Delta, open_delta
from expo_serve.plan.packed import PackedDelta
from expo_serve.plan.pair import plan_pair
from expo_serve.plan.plan import Plan, PlannedTensor
from expo_serve.plan.prepare import locate

_EPILOG = """\
  expo-serve delta create --base B --aligned A --out D      pack what takes B to A
  expo-serve delta verify --base B --delta D [--aligned A]  check every block; with A, that it decodes to A
  expo-serve delta apply  --base B --delta D --out A        write A back (also from a LoRA adapter or a full delta)

Then: expo-serve --base B --delta D --alpha X

Exit codes: 0 well; 2 the call or the sources are wrong, or a file is damaged; 1 values are not what they must be,
or writing failed.
"""
_FLAGS = {"create": ("base", "aligned", "out"), "verify": ("base", "delta"), "apply": ("base", "delta", "out")}
"""What each action needs."""


def main(arguments: list[str]) -> int:
    """Create, verify or apply; returns 0."""
    action = arguments[0] if arguments else ""
    parser = _parser()
    if action in ("-h", "--help"):
        parser.parse_args(["--help"])
    if action not in _FLAGS:
        found = f"found {action!r}" if action else "found nothing"
        raise UsageError(f"delta: expected create, verify or apply, {found}; see expo-serve delta --help")
    given = parser.parse_args(normalise(arguments[1:], parser.known_flags()))
    _check(action, given)
    {"create": _create, "verify": _verify, "apply": _apply}[action](given)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="expo-serve delta",
        usage="expo-serve delta create|verify|apply --base B ...",
        description="A packed delta is a lossless difference of two checkpoints, a few percent of their size.",
        epilog=_EPILOG,
    )
    parser.add_argument("--base", metavar="B", help="the model before alignment: folder or hub id")
    parser.add_argument("--aligned", metavar="A", help="the model after alignment: folder or hub id")
    parser.add_argument("--delta", metavar="D", help="the delta: folder or hub id")
    for side in ("base", "aligned", "delta"):
        parser.add_argument(f"--{side}-revision", metavar="R", help="branch, tag or commit of a hub id")
    parser.add_argument("--out", metavar="DIR", help="the folder to write; it must not exist")
    parser.add_argument(
        "--unmatched", choices=("refuse", "copy"), default="refuse",
        help="create: with copy, tensors that only aligned has are stored whole, those that only base has left out",
    )  # fmt: skip
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="apply: largest file (default 5GB)")
    parser.add_argument("--hf-token", nargs="?", const=True, metavar="TOKEN", help="token for the hub (or HF_TOKEN)")
    parser.add_argument("--download-dir", metavar="DIR", help="where downloads go instead of the hub cache")
    return parser


def _check(action: str, given: argparse.Namespace) -> None:
    needed = _FLAGS[action]
    for name in needed:
        if not getattr(given, name):
            raise UsageError(f"delta {action}: --{name} is missing; see expo-serve delta --help")
    allowed = {*needed, *(("aligned",) if action == "verify" else ())}
    for name in ("aligned", "delta", "out"):
        if getattr(given, name) is not None and name not in allowed:
            raise UsageError(f"delta {action} takes no --{name}; see expo-serve delta --help")
    if "out" in needed:
        new_path(given.out)
    parse_size(given.max_shard_size)


def _create(given: argparse.Namespace) -> None:
    out, hub = new_path(given.out), _hub(given)
    config = _config(given, aligned=given.aligned, aligned_revision=given.aligned_revision, unmatched=given.unmatched)
    base = open_checkpoint("base", locate("base", config, hub))
    aligned = open_checkpoint("aligned", locate("aligned", config, hub))
    plan = plan_pair(base, aligned, config)
    for name in plan.left_out:  # no model loads them; the checkpoint has them all the same
        plan.tensors[name] = PlannedTensor(aligned.tensors[name], None, 0.0)
    with new_folder(out, "delta create") as folder, progress("delta create", plan.weight_bytes) as advance:
        from expo_serve.write.packed import pack

        copy_side_files(Path(aligned.source.path), folder)
        pack(plan, folder, advance)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"wrote {out}: {size / 1e6:,.1f} MB, {size / max(1, plan.weight_bytes):.1%} of {aligned.source.name}")


def _verify(given: argparse.Namespace) -> None:
    hub = _hub(given)
    delta, plan = _open(given, hub)
    if not isinstance(delta, PackedDelta):
        raise UsageError(
            f"delta verify: {given.delta} is a {delta.kind} delta, which carries no checksums; it can be applied "
            f"or served"
        )
    aligned = None
    if given.aligned:
        aligned = open_checkpoint("aligned", find_source("aligned", given.aligned, given.aligned_revision, hub))
    with progress("delta verify", plan.weight_bytes) as advance:
        from expo_serve.write.verify import check

        check(plan, aligned, advance)
    same = f", and decodes to {aligned.source.name}" if aligned else ""
    print(f"{given.delta} is whole, fits {plan.base.source.name}{same}")


def _apply(given: argparse.Namespace) -> None:
    from expo_serve.cli.merge import write_checkpoint

    out = new_path(given.out)
    _, plan = _open(given, _hub(given))
    with new_folder(out, "delta apply") as folder, progress("delta apply", plan.weight_bytes) as advance:
        write_checkpoint(plan, folder, parse_size(given.max_shard_size), advance)
    print(f"wrote {out}")


def _open(given: argparse.Namespace, hub: HubAccess) -> tuple[Delta, Plan]:
    """The delta, and a plan at alpha 0 with every tensor."""
    config = _config(given, delta=given.delta, delta_revision=given.delta_revision)
    base = open_checkpoint("base", locate("base", config, hub))
    delta = open_delta(locate("delta", config, hub))
    return delta, delta.plan_all(base, config) if isinstance(delta, PackedDelta) else delta.plan(base, config)


def _config(given: argparse.Namespace, **values: str | None) -> ExpoConfig:
    return parse_config({"base": given.base, "base_revision": given.base_revision, "alpha": 0, **values}, "flags")


def _hub(given: argparse.Namespace) -> HubAccess:
    return HubAccess(given.hf_token, given.download_dir)
