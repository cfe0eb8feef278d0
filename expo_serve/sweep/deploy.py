"""How to serve the recommended alpha: the command, and the chart's values for a canary of it beside alpha 0.

The sources are pinned to the commits that were measured, and no secret of the command line is repeated.
"""

from __future__ import annotations

import os.path
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from expo_serve.config import ExpoConfig, Source, format_alpha
from expo_serve.sweep.canary import Canary, Origin, canary_values
from expo_serve.sweep.flags import Flag, read_flags

_SECRETS = {"api-key": "VLLM_API_KEY", "hf-token": "HF_TOKEN"}
"""Flags with secrets, and the variables of the environment from which the command takes them instead."""


def deploy_command(
    config: ExpoConfig, alpha: float, arguments: Sequence[str] = (), file_options: Mapping[str, Any] | None = None
) -> str:
    """Return the command line that serves an alpha of the sources that a sweep measured, quoted for a shell.

    Args:
        config: what was measured, pinned; its own alpha does not count.
        alpha: the alpha to serve.
        arguments: vLLM's flags of the sweep.
        file_options: keys of its ``--config`` file that are vLLM's.
    """
    words = ["expo-serve"]
    for origin in _origins(config):
        words += _flag(origin.operand, origin.path or origin.hub_id)
        words += _flag(f"{origin.operand}-revision", origin.commit)
    words += _flag("delta-subfolder", config.delta_subfolder)
    words += [*_flag("alpha", format_alpha(alpha)), *_rules(config)]
    return " ".join([shlex.join(words), *map(_quoted, read_flags(arguments, file_options))])


def chart_values(
    config: ExpoConfig,
    alpha: float,
    arguments: Sequence[str] = (),
    file_options: Mapping[str, Any] | None = None,
    *,
    percent: int = 10,
    cpu_weight_bytes: int | None = None,
) -> str:
    """Return values of the chart, as YAML: the alpha beside alpha 0, under one name with weights; alone if it is 0.

    Args:
        config: what was measured, pinned; its own alpha does not count.
        alpha: the alpha to serve.
        arguments: vLLM's flags of the sweep.
        file_options: keys of its ``--config`` file that are vLLM's.
        percent: share of the requests that the alpha is to be given, from 0 to 100.
        cpu_weight_bytes: size of the weights of all ranks, where they are served on CPU; None for GPUs.
    """
    assert config.pinned is not None
    canary = Canary(
        config=config,
        origins=_origins(config),
        served=config.pinned.named_after.short_name,
        alpha=alpha,
        flags=read_flags(arguments, file_options),
        percent=percent,
        cpu_weight_bytes=cpu_weight_bytes,
    )
    return canary_values(canary)


def _origins(config: ExpoConfig) -> list[Origin]:
    """Return where each source is from."""
    pinned = config.pinned
    assert pinned is not None
    sides = (
        ("base", config.base, pinned.base, None),
        ("aligned", config.aligned, pinned.aligned, None),
        ("delta", config.delta, pinned.delta, config.delta_subfolder),
    )
    return [_origin(side, given, found, inner) for side, given, found, inner in sides if given is not None and found]


def _origin(operand: str, given: str, found: Source, subfolder: str | None) -> Origin:
    hub_id = None
    if found.revision is not None:  # A folder has none, unless it is a commit's in the hub's cache.
        hub_id = found.name.removesuffix(f"/{PurePosixPath(subfolder)}") if subfolder else found.name
    path = None if given == hub_id else os.path.abspath(Path(given).expanduser())
    return Origin(operand, hub_id, found.revision, path)


def _rules(config: ExpoConfig) -> list[str]:
    """Return the flags that say what is done with the sources; rounding always, since its default might change."""
    words = [word for rule in config.alpha_rules for word in _flag("alpha-rule", rule.text)]
    words += ["--unmatched", "copy"] if config.unmatched == "copy" else []
    words += [word for name in config.allow for word in _flag("allow", name)]
    words += [word for folder in config.allow_links for word in _flag("allow-links", folder)]
    words += ["--allow-pickle-index"] if config.allow_pickle_index else []
    words += ["--rounding", config.rounding]
    return words + (["--rounding-seed", str(config.rounding_seed)] if config.rounding_seed else [])


def _flag(name: str, value: str | None) -> list[str]:
    if value is None:
        return []
    return [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]


def _quoted(flag: Flag) -> str:
    """Quote a flag and its values; in a secret's place stands the variable that holds it."""
    variable = _SECRETS.get(flag.name)
    return f'--{flag.name} "${variable}"' if variable and flag.values else shlex.join(flag.words)
