"""``expo-serve probe``: check that a running server serves a name at an alpha. For readiness probes and smoke tests.

Uses the standard library only, so that a call takes a fraction of a second of one core.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import urllib.error
import urllib.request
from typing import Any

from expo_serve.cli.parser import Parser
from expo_serve.errors import ServeError, UsageError

_EPILOG = """\
If the server has an API key, set VLLM_API_KEY to it.

Exit codes: 0 success; 1 the server does not answer, or serves something else; 2 the command line is wrong.
"""
_PROMPT = "The capital of France is"
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Ignores proxies from the environment: the probed server is local or in the same cluster."""


def main(arguments: list[str]) -> int:
    """Query the server; returns 0.

    Raises:
        UsageError: the command line is wrong.
        ServeError: the server does not answer, or serves something else.
    """
    given = _read(arguments)
    url, alpha = given.url.rstrip("/"), float(given.alpha)
    _check(_ask(f"{url}/v1/expo", given.timeout), alpha, given.served_model_name)
    line = f"{given.served_model_name or url} serves alpha {given.alpha}"
    if given.completion:
        line += f", and answers {_complete(url, given)!r}"
    print(line)
    return 0


def parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog="expo-serve probe",
        description="Check that a running server serves the given name at the given alpha.",
        epilog=_EPILOG,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's root (default: %(default)s)")
    parser.add_argument("--alpha", metavar="X", required=True, help="the alpha that the server must report")
    parser.add_argument("--served-model-name", metavar="NAME", help="a name that the server must serve")
    parser.add_argument("--completion", action="store_true", help="also request one completion")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds for each request (default: %(default)s)")
    return parser


def _read(arguments: list[str]) -> argparse.Namespace:
    given = parser().parse_args(arguments)
    try:
        float(given.alpha)
    except ValueError:
        raise UsageError(f"--alpha: expected a decimal number such as 0.5, found {given.alpha!r}") from None
    if not given.url.startswith(("http://", "https://")):
        raise UsageError(f"--url: expected http://HOST:PORT, found {given.url!r}")
    return given


def _check(report: Any, alpha: float, name: str | None) -> None:
    if not isinstance(report, dict) or not isinstance(report.get("served_model_names"), list) or "alpha" not in report:
        raise ServeError("the server's /v1/expo is not from expo-serve: alpha and served_model_names are missing")
    if report["alpha"] != alpha:
        raise ServeError(f"the server serves alpha {report['alpha']}, expected {alpha:g}")
    names = report["served_model_names"]
    if name is not None and name not in names:
        raise ServeError(f"the server serves {', '.join(names)}, expected {name}")


def _complete(url: str, given: argparse.Namespace) -> str:
    name = given.served_model_name or _ask(f"{url}/v1/expo", given.timeout)["served_model_names"][0]
    body = {"model": name, "prompt": _PROMPT, "max_tokens": 8, "temperature": 0}
    answer = _ask(f"{url}/v1/completions", given.timeout, {"X-Expo-Alpha": given.alpha}, body)
    try:
        return str(answer["choices"][0]["text"])
    except (KeyError, IndexError, TypeError):
        raise ServeError(f"{url}/v1/completions answered without a completion: {answer!r:.200}") from None


def _ask(url: str, timeout: float, headers: dict[str, str] | None = None, body: dict[str, Any] | None = None) -> Any:
    """Send a GET request, or a POST request if there is a body; returns the JSON of the answer."""
    request = urllib.request.Request(
        url, None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json", **(headers or {})},
    )  # fmt: skip
    if key := os.environ.get("VLLM_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with _OPENER.open(request, timeout=timeout) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        hint = "; the API key is taken from VLLM_API_KEY" if error.code == 401 else ""
        raise ServeError(f"{url} answered {error.code} {error.reason}{hint}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ServeError(f"{url} does not answer: {reason}") from None
