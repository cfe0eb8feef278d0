"""Our flags: read from the command line and from a ``--config`` file; all others are vLLM's.

Precedence: command line, then ``--config`` file, then default.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from expo_serve.checkpoint.source import HubAccess
from expo_serve.cli.parser import Parser
from expo_serve.config import ALPHA_RANGE, ExpoConfig, alpha_from_flag, parse_config, rules_from_flags
from expo_serve.errors import ConfigError, UsageError

_SOURCE_FLAGS = (
    "base", "aligned", "delta", "alpha", "base-revision", "aligned-revision", "delta-revision", "alpha-rule",
    "unmatched",
)  # fmt: skip
_SHARED_FLAGS = ("hf-token", "download-dir")
_OURS_TO_SET = ("model", "load-format", "model-loader-extra-config", "worker-extension-cls")


@dataclass(frozen=True)
class Options:
    """What was asked for: the deployment, how the hub is reached, and what goes on to vLLM.

    ``unknown`` are the flags that are not ours; ``arguments`` holds them and those that vLLM shares.
    """

    config: ExpoConfig
    hub: HubAccess
    namespace: argparse.Namespace
    unknown: list[str]
    arguments: list[str]
    file_options: dict[str, Any]


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is extrapolated."""
    group = parser.add_argument_group("what is extrapolated")
    group.add_argument("--base", metavar="B", help="the model before alignment: folder or hub id")
    group.add_argument("--aligned", metavar="A", help="the model after alignment: folder or hub id")
    group.add_argument(
        "--delta", metavar="D",
        help="in place of --aligned, what takes base to it: a packed delta, a LoRA adapter or a full delta",
    )  # fmt: skip
    group.add_argument("--alpha", metavar="X", help="how far to go on from base through aligned: 0 is aligned itself, "
                       f"-1 is base; {ALPHA_RANGE}")  # fmt: skip
    group.add_argument("--base-revision", metavar="R", help="branch, tag or commit of a hub id")
    group.add_argument(
        "--aligned-revision", "--revision", metavar="R", dest="aligned_revision",
        help="branch, tag or commit of a hub id",
    )  # fmt: skip
    group.add_argument("--delta-revision", metavar="R", help="branch, tag or commit of a hub id")
    group.add_argument(
        "--alpha-rule", metavar="REGEX=VALUE", action="append", default=[],
        help="another alpha for the tensors whose name matches (first match decides); may be repeated",
    )  # fmt: skip
    group.add_argument(
        "--unmatched", choices=("refuse", "copy"),
        help="tensors on one side only: refuse the pair (default), or take aligned's over and ignore base's",
    )  # fmt: skip
    shared = parser.add_argument_group("where it comes from")
    shared.add_argument("--hf-token", nargs="?", const=True, metavar="TOKEN", help="token for the hub (or HF_TOKEN)")
    shared.add_argument("--download-dir", metavar="DIR", help="where downloads go instead of the hub cache")
    shared.add_argument("--config", metavar="FILE.yaml", help="flags as keys of a YAML file; the command line wins")


def read_options(parser: Parser, arguments: Sequence[str]) -> Options:
    """Parse and validate everything that is ours; the rest is kept as it is, for vLLM.

    Raises:
        UsageError: a flag of ours is wrong, missing, or one of vLLM's that is ours to set.
        ConfigError: the ``--config`` file is wrong.
    """
    namespace, rest = parser.parse_known_args(normalise(arguments, parser.known_flags()))
    if rest and not rest[0].startswith("-"):
        raise UsageError(f"unexpected {rest[0]!r}: the models are named by --base and --aligned or --delta")
    for argument in rest:
        _refuse_ours_to_set(argument.split("=", 1)[0])
    from_file = {} if namespace.config is None else _read_file(namespace.config)
    for key in from_file:
        _refuse_ours_to_set(f"--{key}")
    values = {key: _pick(namespace, from_file, key) for key in (*_SOURCE_FLAGS, *_SHARED_FLAGS)}
    hub = _hub_access(values.pop("hf-token"), values.pop("download-dir"))
    return Options(_validate(values), hub, namespace, rest, [*rest, *_forward(namespace)], from_file)


def normalise(arguments: Sequence[str], known: Collection[str]) -> list[str]:
    """Underscores in our flags as vLLM allows them, and values that begin with ``-`` (``--alpha -1e-3``).

    Args:
        arguments: the command line.
        known: the flags that are ours, with their hyphens.
    """
    result: list[str] = []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        flag, equals, value = argument.partition("=")
        name = flag.replace("_", "-")
        if name not in known:
            result.append(argument)
        elif equals or not pending or pending[0].startswith("--") or name[2:] not in (*_SOURCE_FLAGS, "revision"):
            result.append(f"{name}{equals}{value}")
        else:
            result.append(f"{name}={pending.pop(0)}")
    return result


def _refuse_ours_to_set(flag: str) -> None:
    name = flag.replace("_", "-").removeprefix("--").split(".")[0]
    if flag.startswith("--") and name in _OURS_TO_SET:
        raise UsageError(
            f"--{name} is set by expo-serve; leave it out (--base and --aligned or --delta name the models)"
        )


def _read_file(path: str) -> dict[str, Any]:
    if Path(path).suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--config: expected a .yaml or .yml file, found {path!r}")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"--config: {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or an impossible date
        raise ConfigError(f"--config: {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"--config: {path} must map flag names to values")
    options = {key.replace("_", "-"): value for key, value in content.items()}
    if len(options) < len(content) or {"revision", "aligned-revision"} <= options.keys():
        raise ConfigError(
            f"--config: {path} gives one flag under two names (hyphens and underscores, or revision "
            "and aligned-revision); leave one out"
        )
    return options


def _pick(namespace: argparse.Namespace, from_file: dict[str, Any], key: str) -> Any:
    """One of our values; what vLLM does not share is taken out of the file's, which go on to vLLM."""
    in_file = from_file.get(key)
    if key not in _SHARED_FLAGS:
        name = "revision" if key == "aligned-revision" and "revision" in from_file else key
        in_file = from_file.pop(name, None)
    given = getattr(namespace, key.replace("-", "_"))
    return in_file if given in (None, []) else given


def _validate(values: dict[str, Any]) -> ExpoConfig:
    if values["aligned"] is not None and values["delta"] is not None:
        raise UsageError("--aligned and --delta are both given: leave one out")
    other = "aligned" if values["delta"] is None else "delta"
    for side, revision in (("aligned", "aligned-revision"), ("delta", "delta-revision")):
        if side != other and values[revision] is not None:
            raise UsageError(f"--{revision} is given, but --{side} is not")
    for key, hint in (("base", "folder or hub id"), (other, "folder or hub id"), ("alpha", ALPHA_RANGE)):
        if values[key] is None:
            raise UsageError(f"--{key} is missing: expected {hint}")
        if values[key] == "":
            raise UsageError(f"--{key} is empty: expected {hint}")
    rules = values.pop("alpha-rule")
    for key, value in values.items():
        if key != "alpha" and not isinstance(value, str | None):
            raise UsageError(f"--{key}: expected a text, found {value!r:.100}")
    config = {key.replace("-", "_"): value for key, value in values.items() if value is not None}
    config["alpha"] = alpha_from_flag(values["alpha"])
    config["alpha_rules"] = rules_from_flags([] if rules is None else rules)
    return parse_config(config, "flags")


def _hub_access(token: Any, download_dir: Any) -> HubAccess:
    if not isinstance(token, str | bool | None):
        raise UsageError("--hf-token: expected a text, or nothing for the stored token")
    if not isinstance(download_dir, str | None):
        raise UsageError(f"--download-dir: expected a folder, found {download_dir!r:.100}")
    return HubAccess(token, download_dir)


def _forward(namespace: argparse.Namespace) -> list[str]:
    """Flags that hold for our sources and for vLLM alike."""
    flags: list[str] = []
    if namespace.hf_token:
        flags += ["--hf-token"] if namespace.hf_token is True else ["--hf-token", namespace.hf_token]
    if namespace.download_dir:
        flags += ["--download-dir", namespace.download_dir]
    return flags
