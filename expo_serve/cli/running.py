"""Flags of the running server that are expo-serve's own: the status port and the watchdog."""

from __future__ import annotations

import argparse
import math
from typing import Any, NamedTuple

from expo_serve.cli.options import Options
from expo_serve.errors import UsageError

DEFAULT_ENGINE_TIMEOUT = 120.0
"""In seconds. An engine answers between two steps of the model. Steps of the largest prefills that vLLM schedules take
seconds on an accelerator, and up to a minute on a slow CPU; vLLM itself gives a step up after 300 s."""
_MAX_SECONDS = 86_400.0
_HOST_SPELLINGS = ("--host", "--hos", "--ho")
"""vLLM's parser accepts abbreviations; a shorter one could also mean other flags."""


class Running(NamedTuple):
    """What the flags say."""

    status_port: int | None
    engine_timeout: float
    """In seconds; 0 is off."""


def add_running_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the running server."""
    group = parser.add_argument_group("the running server")
    group.add_argument(
        "--status-port", metavar="P",
        help="open a second port at once, with the state of the start and of the server: /live, /ready, /state, "
             "/metrics; without a key",
    )  # fmt: skip
    group.add_argument(
        "--engine-timeout", metavar="S",
        help="seconds without an answer of the engine after which the server is not ready; after twice that it ends "
             f"(default {DEFAULT_ENGINE_TIMEOUT:g}, 0 is off)",
    )  # fmt: skip


def read_running(options: Options) -> Running:
    """Read the flags; keys of the ``--config`` file are taken out of what vLLM gets.

    Raises:
        UsageError: a value is wrong.
    """
    port, seconds = (_pick(options, key) for key in ("status-port", "engine-timeout"))
    return Running(
        None if port is None else _port(port), DEFAULT_ENGINE_TIMEOUT if seconds is None else _seconds(seconds)
    )


def _pick(options: Options, key: str) -> Any:
    in_file = options.file_options.pop(key, None)
    given = getattr(options.namespace, key.replace("-", "_"))
    return in_file if given is None else given


def _port(given: Any) -> int:
    text = str(given)
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise UsageError(f"--status-port: expected a port from 1 to 65535, found {given!r:.100}")
    return int(text)


def _seconds(given: Any) -> float:
    try:
        seconds = float(given)
    except (TypeError, ValueError):
        seconds = math.nan
    if isinstance(given, bool) or not 0 <= seconds <= _MAX_SECONDS:
        raise UsageError(f"--engine-timeout: expected seconds from 0 (off) to {_MAX_SECONDS:g}, found {given!r:.100}")
    return seconds


def host_of(options: Options) -> str:
    """Return the address that vLLM's ``--host`` names; empty for all interfaces."""
    found = options.file_options.get("host")
    for argument, following in zip(options.arguments, [*options.arguments[1:], ""], strict=False):
        flag, equals, value = argument.partition("=")
        if flag in _HOST_SPELLINGS:
            found = value if equals else following
    return str(found or "")
