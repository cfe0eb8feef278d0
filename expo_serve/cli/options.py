"""Flags of expo-serve, read from the command line and a ``--config`` file; all other flags belong to vLLM.

Precedence: command line, then ``--config`` file, then default.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from expo_serve.checkpoint.source import HubAccess
from expo_serve.cli.pair_flag import add_pair_flag, put_pair
from expo_serve.cli.parser import Parser
from expo_serve.config import ALPHA_RANGE, SEED_RANGE, SOURCE_EXPECTED, DoubtName, ExpoConfig, Method, parse_config
from expo_serve.errors import ConfigError, UsageError
from expo_serve.shown import plain, shown

_SOURCE_FLAGS = (
    "base", "aligned", "delta", "alpha", "base-revision", "aligned-revision", "delta-revision", "delta-subfolder",
    "alpha-rule", "unmatched", "allow", "allow-links", "allow-pickle-index", "rounding", "rounding-seed",
)  # fmt: skip
REVISION_HELP = "branch, tag or commit on the hub"
SUBFOLDER_HELP = "the folder of the adapter within --delta, where that holds several"
_SHARED_FLAGS = ("hf-token", "download-dir")
_MAX_VALUES = 10_000
"""Of a ``--config`` file."""
_SET_BY_US = ("model", "load-format", "model-loader-extra-config", "worker-extension-cls")
"""Flags of vLLM that expo-serve sets itself."""


@dataclass(frozen=True)
class Options:
    """The parsed command line: the deployment, the access to the hub, and what is passed on to vLLM."""

    config: ExpoConfig
    hub: HubAccess
    namespace: argparse.Namespace
    """All flags of expo-serve, as argparse parsed them."""
    unknown: list[str]
    """Arguments that are not flags of expo-serve, in their order."""
    arguments: list[str]
    """``unknown``, and the flags that both expo-serve and vLLM use."""
    file_options: dict[str, Any]
    """Keys of the ``--config`` file that are passed on to vLLM."""


def add_source_flags(parser: argparse.ArgumentParser, *, with_alpha: bool = True) -> None:
    """Add the flags that name the sources and alpha.

    Args:
        parser: the parser of a command.
        with_alpha: False for a command that chooses alpha itself.
    """
    group = parser.add_argument_group("extrapolation")
    add_pair_flag(group, with_alpha=with_alpha)
    group.add_argument("--base", metavar="B", help="the model before alignment: folder or hub id")
    group.add_argument("--aligned", metavar="A", help="the model after alignment: folder or hub id")
    group.add_argument(
        "--delta", metavar="D",
        help="instead of --aligned, its difference from base: a packed delta, a LoRA adapter or a full delta",
    )  # fmt: skip
    if with_alpha:
        group.add_argument("--alpha", metavar="X", help="how far to extrapolate from base through aligned: 0 gives "
                           f"aligned itself, -1 gives base; {ALPHA_RANGE}")  # fmt: skip
    group.add_argument("--base-revision", metavar="R", help=REVISION_HELP)
    group.add_argument(
        "--aligned-revision", "--revision", metavar="R", dest="aligned_revision", help=REVISION_HELP,
    )  # fmt: skip
    group.add_argument("--delta-revision", metavar="R", help=REVISION_HELP)
    group.add_argument("--delta-subfolder", metavar="DIR", help=SUBFOLDER_HELP)
    group.add_argument(
        "--alpha-rule", metavar="REGEX=VALUE", action="append", default=[],
        help="use another alpha for the tensors whose name matches; the first matching rule wins; can be repeated",
    )  # fmt: skip
    group.add_argument(
        "--unmatched", choices=("refuse", "copy"),
        help="tensors that only one checkpoint has: refuse the pair (default), or copy aligned's and ignore base's",
    )  # fmt: skip
    add_allow_flag(group)
    add_rounding_flags(group)
    shared = parser.add_argument_group("access to the sources")
    add_hub_flags(shared)
    shared.add_argument("--config", metavar="FILE.yaml", help="flags as keys of a YAML file; the command line wins")


def add_allow_flag(group: argparse._ActionsContainer) -> None:
    """Add the flags that allow what is refused otherwise."""
    group.add_argument(
        "--allow", metavar="NAME", action="append", default=[],
        help="accept what most often means a wrong model and is refused otherwise; can be repeated: "
             f"{', '.join(get_args(DoubtName))}",
    )  # fmt: skip
    group.add_argument(
        "--allow-links", metavar="DIR", action="append", default=[],
        help="a folder to which links among the files of the sources may lead; can be repeated",
    )  # fmt: skip
    group.add_argument(
        "--allow-pickle-index", action="store_const", const=True,
        help="read PyTorch's .bin files where a source has no safetensors: their pickle is walked over to find the "
             "tensors, and nothing of it is run",
    )  # fmt: skip


def add_rounding_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags that say how results in 16 bits are rounded."""
    group.add_argument(
        "--rounding", choices=get_args(Method),
        help="of results in bf16 and fp16: dithered (default) keeps alpha true, since it rounds up or down with the "
             "probability of the distance; nearest gives the bits that other tools write",
    )  # fmt: skip
    group.add_argument(
        "--rounding-seed", metavar="N", help=f"which random bits dithered rounding takes: {SEED_RANGE} (default 0)"
    )


def add_hub_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags for access to the hub; vLLM has them too."""
    group.add_argument("--hf-token", nargs="?", const=True, metavar="TOKEN", help="token for the hub (or HF_TOKEN)")
    group.add_argument("--download-dir", metavar="DIR", help="download folder, instead of the hub's cache")


def read_options(parser: Parser, arguments: Sequence[str], *, needs_alpha: bool = True) -> Options:
    """Parse and validate the flags of expo-serve; all other arguments are kept unchanged, for vLLM.

    What ``--pair`` stands for is said in one line on standard error; nothing but base, aligned and alpha is left of it.

    Args:
        parser: the command's, with the flags of :func:`add_source_flags`.
        arguments: the command line.
        needs_alpha: False for a command that chooses alpha itself: the configuration has alpha 0 then, whatever a
            ``--config`` file says.

    Raises:
        UsageError: a flag is wrong or missing, or is a flag of vLLM that expo-serve sets itself.
        ConfigError: the ``--config`` file is wrong.
    """
    namespace, rest = parser.parse_known_args(normalise(arguments, parser.known_flags()))
    if rest and not rest[0].startswith("-"):
        raise UsageError(f"unexpected {rest[0]!r}: name the models with --base and --aligned or --delta")
    for argument in rest:
        _refuse_set_by_us(argument.split("=", 1)[0])
    from_file = {} if namespace.config is None else _read_file(namespace.config)
    for key in from_file:
        _refuse_set_by_us(f"--{key}")
    values = {key: _pick(namespace, from_file, key) for key in ("pair", *_SOURCE_FLAGS, *_SHARED_FLAGS)}
    hub = _hub_access(values.pop("hf-token"), values.pop("download-dir"))
    if not needs_alpha:
        _refuse_alpha(rest)
        values["alpha"] = 0
    said = put_pair(values, with_alpha=needs_alpha)
    config = _validate(values)
    if said:
        print(said, file=sys.stderr, flush=True)
    return Options(config, hub, namespace, rest, [*rest, *_forward(namespace)], from_file)


def normalise(arguments: Sequence[str], known: Collection[str]) -> list[str]:
    """Rewrite flags with underscores, as vLLM accepts them, and values that begin with ``-`` (``--alpha -1e-3``).

    Args:
        arguments: the command line.
        known: the flags of expo-serve, with hyphens; all others are kept unchanged.
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


def _refuse_set_by_us(flag: str) -> None:
    name = flag.replace("_", "-").removeprefix("--").split(".")[0]
    if flag.startswith("--") and name in _SET_BY_US:
        raise UsageError(
            f"--{name} is set by expo-serve; leave it out (the models are named by --base and --aligned or --delta)"
        )


def _refuse_alpha(rest: Sequence[str]) -> None:
    """Refuse ``--alpha``, which vLLM would be given otherwise."""
    if any(argument.split("=")[0] == "--alpha" for argument in rest):
        raise UsageError("--alpha: this command chooses alpha itself; leave it out, or give several with --alphas")


class _Loader(yaml.SafeLoader):
    """Refuses a document of a few lines that means millions of values, each an alias of the ones before."""

    def construct_document(self, node: yaml.Node) -> Any:
        if _values_in(node, {}) > _MAX_VALUES:
            raise yaml.YAMLError(f"its aliases stand for more than {_MAX_VALUES} values")
        return super().construct_document(node)


def _values_in(node: yaml.Node, counted: dict[yaml.Node, int]) -> int:
    """Return the number of values that a node stands for, with each alias followed."""
    if node in counted:
        return counted[node]
    counted[node] = _MAX_VALUES + 1  # for a node that holds itself
    children = node.value if isinstance(node, yaml.CollectionNode) else ()
    inner = (child for item in children for child in (item if isinstance(item, tuple) else (item,)))
    counted[node] = 1 + sum(_values_in(child, counted) for child in inner)
    return counted[node]


def _read_file(path: str) -> dict[str, Any]:
    if Path(path).suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--config: expected a .yaml or .yml file, found {path!r}")
    try:
        content = yaml.load(Path(path).read_text(), _Loader)
    except OSError as error:
        raise ConfigError(f"--config: {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or an impossible date
        raise ConfigError(f"--config: {path} is not valid YAML: {plain(' '.join(str(error).split()), 500)}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"--config: {path} must map flag names to values")
    options = {key.replace("_", "-"): value for key, value in content.items()}
    if len(options) < len(content) or {"revision", "aligned-revision"} <= options.keys():
        raise ConfigError(
            f"--config: {path} gives a flag under two names (hyphens and underscores, or revision and "
            "aligned-revision); leave one out"
        )
    return options


def _pick(namespace: argparse.Namespace, from_file: dict[str, Any], key: str) -> Any:
    """Return the value of one flag; a key that vLLM does not share is removed from ``from_file``."""
    in_file = from_file.get(key)
    if key not in _SHARED_FLAGS:
        name = "revision" if key == "aligned-revision" and "revision" in from_file else key
        in_file = from_file.pop(name, None)
    given = getattr(namespace, key.replace("-", "_"), None)  # not every command has --alpha
    return in_file if given in (None, []) else given


def flag_of(key: str) -> str:
    """Return the flag that sets a key of :class:`ExpoConfig`; ``alpha_rules.0`` gives ``--alpha-rule``."""
    name = key.split(".")[0]
    return "--alpha-rule" if name == "alpha_rules" else "--" + name.replace("_", "-")


def _validate(values: dict[str, Any]) -> ExpoConfig:
    """Require the flags that the command cannot do without; the model holds all other rules."""
    other = "aligned" if values["delta"] is None else "delta"
    for key, expected in (("base", SOURCE_EXPECTED), (other, SOURCE_EXPECTED), ("alpha", ALPHA_RANGE)):
        if values[key] in (None, ""):
            raise UsageError(f"--{key} is {'missing' if values[key] is None else 'empty'}: expected {expected}")
    rules = values.pop("alpha-rule")
    config = {key.replace("-", "_"): value for key, value in values.items() if value is not None}
    if rules is not None:
        config["alpha_rules"] = rules if isinstance(rules, list) else [rules]
    return parse_config(config, name=flag_of)


def _hub_access(token: Any, download_dir: Any) -> HubAccess:
    if not isinstance(token, str | bool | None):
        raise UsageError("--hf-token: expected a string, or no value to use the stored token")
    if not isinstance(download_dir, str | None):
        raise UsageError(f"--download-dir: expected a folder, found {shown(download_dir)}")
    return HubAccess(token, download_dir)


def _forward(namespace: argparse.Namespace) -> list[str]:
    """Return the flags that both expo-serve and vLLM use."""
    flags: list[str] = []
    if namespace.hf_token:
        flags += ["--hf-token"] if namespace.hf_token is True else ["--hf-token", namespace.hf_token]
    if namespace.download_dir:
        flags += ["--download-dir", namespace.download_dir]
    return flags
