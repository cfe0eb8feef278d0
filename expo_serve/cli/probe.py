"""``expo-serve probe``: check that a running server serves a name at an alpha. For readiness probes and smoke tests.

Uses the standard library only, so that a call takes a fraction of a second of one core.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import Any

from expo_serve.cli.asking import Server, parse_url, printable, within
from expo_serve.cli.parser import Parser
from expo_serve.cli.probe_state import probe_state
from expo_serve.errors import ServeError, UsageError

_EPILOG = """\
If the server has an API key, set VLLM_API_KEY to it. It is sent to that server only: no redirect is followed.

Exit codes: 0 success; 1 the server does not answer, is not ready, or serves something else; 2 the command line is
wrong.
"""
_PROMPT = "The capital of France is"
_MAX_SECONDS = 86_400.0


def main(arguments: list[str]) -> int:
    """Query the server; returns 0.

    Raises:
        UsageError: the command line is wrong.
        ServeError: the server does not answer in time, or serves something else.
    """
    given = _read(arguments)
    server = parse_url(given.url, os.environ)
    _say(within(given.timeout, server.url, lambda: (_probe_state if given.state else _probe)(server, given)))
    return 0


def parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog="expo-serve probe",
        description="Check that a running server serves the given name at the given alpha.",
        epilog=_EPILOG,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's root (default: %(default)s)")
    parser.add_argument("--alpha", metavar="X", help="the alpha that the server must report")
    parser.add_argument("--served-model-name", metavar="NAME", help="a name that the server must serve")
    parser.add_argument("--completion", action="store_true", help="also request one completion")
    parser.add_argument(
        "--state", action="store_true",
        help="ask the status port (--url with the port of --status-port) how far the start is, and whether the server "
             "is ready; --alpha need not be given",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", metavar="SECONDS", default="30", help="limit of the whole probe (default: %(default)s)"
    )
    return parser


def _read(arguments: list[str]) -> argparse.Namespace:
    given = parser().parse_args(arguments)
    if given.alpha is None and not given.state:
        raise UsageError("--alpha is missing: expected the alpha that the server must report, or --state")
    if given.state and given.completion:
        raise UsageError("--completion: the status port answers no completions; leave it out, or --state")
    given.alpha = None if given.alpha is None else given.alpha.strip()
    if given.alpha is not None and not math.isfinite(_number(given.alpha)):
        raise UsageError(f"--alpha: expected a decimal number such as 0.5, found {given.alpha!r:.100}")
    seconds = _number(given.timeout)
    if not 0 < seconds <= _MAX_SECONDS:
        raise UsageError(
            f"--timeout: expected seconds, above 0 and up to {_MAX_SECONDS:g}, found {given.timeout!r:.100}"
        )
    given.timeout = seconds
    if given.served_model_name == "":
        raise UsageError("--served-model-name is empty: expected a name, or no such flag for any name")
    return given


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _probe_state(server: Server, given: argparse.Namespace) -> str:
    return probe_state(server, given.alpha, given.served_model_name, given.timeout)


def _probe(server: Server, given: argparse.Namespace) -> str:
    """Ask the server; returns what it serves, in one line."""
    names = _check(server.ask("/v1/expo", given.timeout), given)
    line = f"{given.served_model_name or server.url} serves alpha {given.alpha}"
    if given.completion:
        line += f", and answers {_complete(server, names, given)!r:.200}"
    return line


def _check(report: Any, given: argparse.Namespace) -> list[str]:
    """Compare a report with what is expected; returns the served names."""
    report = report if isinstance(report, dict) else {}
    alpha, names = report.get("alpha"), report.get("served_model_names")
    is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not (is_number and isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ServeError(
            "the server's /v1/expo is not from expo-serve: expected alpha, a number, and served_model_names, a list of "
            "strings"
        )
    if alpha != float(given.alpha):
        raise ServeError(f"the server serves alpha {printable(alpha)}, expected {given.alpha}")
    name = given.served_model_name
    if name not in (None, *names):
        raise ServeError(f"the server serves {printable(', '.join(names))}, expected {printable(name)}")
    return names


def _complete(server: Server, names: list[str], given: argparse.Namespace) -> str:
    name = given.served_model_name or next(iter(names), None)
    if name is None:
        raise ServeError("the server names no model of which a completion could be asked")
    body = {"model": name, "prompt": _PROMPT, "max_tokens": 8, "temperature": 0}
    answer = server.ask("/v1/completions", given.timeout, headers={"X-Expo-Alpha": repr(float(given.alpha))}, body=body)
    try:
        text = answer["choices"][0]["text"]
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ServeError(f"{server.url}/v1/completions answered without a completion")
    return text


def _say(line: str) -> None:
    """Print a line, whatever the terminal's encoding."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding))
