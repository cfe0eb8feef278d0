"""The flag ``--pair``: a published pair in place of base and aligned, put there before anything else sees the flags."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, MutableMapping
from typing import Any

from expo_serve.checkpoint.published import PublishedPair, find_pair
from expo_serve.config import ALPHA_RANGE, format_alpha
from expo_serve.errors import UsageError

_HELPING = ("base-revision", "aligned-revision", "allow-pickle-index")
"""Flags that make a side without safetensors readable."""


def add_pair_flag(group: argparse._ActionsContainer, *, with_alpha: bool = True) -> None:
    """Add the flag.

    Args:
        group: the parser, or a group of it.
        with_alpha: whether the command takes an alpha.
    """
    alpha = ", at the alpha that ExPO's authors found for it if --alpha is not given" if with_alpha else ""
    group.add_argument(
        "--pair",
        metavar="NAME",
        help=f"in place of --base and --aligned: a published pair (see expo-serve pairs){alpha}",
    )


def put_pair(values: MutableMapping[str, Any], *, with_alpha: bool = True) -> str | None:
    """Take ``pair`` out of the flags' values, and put what it stands for into their places.

    Args:
        values: values of the flags by their names without the leading hyphens; None where one is not given.
        with_alpha: whether to give an alpha too, if there is none.

    Returns:
        The line that says what was put there; None without a pair.

    Raises:
        UsageError: there is no such pair, a flag is given in whose place it stands, or nobody gives an alpha.
    """
    name = values.pop("pair", None)
    if name is None:
        return None
    for key in ("base", "aligned", "delta"):
        if values.get(key) is not None:
            raise UsageError(f"--pair and --{key} are both given: leave one out")
    pair = find_pair(name, "--pair")
    said = [f"base {pair.base}, aligned {pair.aligned}", *([_put_alpha(values, pair)] if with_alpha else [])]
    values["base"], values["aligned"] = pair.base, pair.aligned
    return f"expo-serve: --pair {pair.name}: {', '.join(said)}{_what_helps(values, pair)}"


def _put_alpha(values: MutableMapping[str, Any], pair: PublishedPair) -> str:
    """Give the pair's alpha if there is none; returns what to say of it."""
    if pair.alpha is None:
        found = f"ExPO's authors found no alpha that helps ({pair.source})"
        if values["alpha"] is None:
            raise UsageError(f"--pair {pair.name}: {found}: give --alpha, {ALPHA_RANGE}")
        return found
    found = f"alpha {format_alpha(pair.alpha)}"
    if values["alpha"] is not None:
        return f"for which ExPO's authors found {found} ({pair.source})"
    values["alpha"] = pair.alpha
    return f"{found} as ExPO's authors found ({pair.source})"


def _what_helps(values: Mapping[str, Any], pair: PublishedPair) -> str:
    """Return what to add where a side has only ``.bin`` files, unless it is given."""
    if not pair.access_flags or any(values.get(key) for key in _HELPING):
        return ""
    return f"; not all of its weights are stored as safetensors: add {' '.join(pair.access_flags)}"
