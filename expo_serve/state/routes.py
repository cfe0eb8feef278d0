"""What the status port shows at each path."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

from expo_serve.state.exposition import exposition

METRICS = "/metrics"
_METHODS = ("GET", "HEAD")
_JSON = "application/json"
_TEXT = "text/plain; version=1.0.0; charset=utf-8"

Snapshot = Mapping[str, Any]


class Answer(NamedTuple):
    """What a request gets.

    Args:
        status: of HTTP.
        content_type: of the body.
        body: as bytes; empty for what has none.
        headers: further ones.
    """

    status: HTTPStatus
    content_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


def answer(method: str, path: str, take: Callable[[], Snapshot]) -> Answer:
    """Return what a request gets; nothing of the request is in it.

    Args:
        method: of HTTP.
        path: without a query.
        take: takes a snapshot of the state (:func:`expo_serve.state.snapshot.snapshot`).
    """
    route = _ROUTES.get(path)
    if route is None:
        return refusal(HTTPStatus.NOT_FOUND, f"not found; there are {', '.join(_ROUTES)}")
    if method not in _METHODS:
        return refusal(HTTPStatus.METHOD_NOT_ALLOWED)._replace(headers=(("Allow", ", ".join(_METHODS)),))
    return route(take())


def refusal(status: int, message: str | None = None) -> Answer:
    """Return the answer to a request that gets nothing; the message is the status's own phrase by default."""
    found = HTTPStatus(status)
    return Answer(found, _JSON, _encode({"error": {"message": message or found.phrase, "code": found}}))


def _live(state: Snapshot) -> Answer:
    is_live = state["phase"] != "failed"
    return _json({"live": is_live, "phase": state["phase"]}, is_live)


def _ready(state: Snapshot) -> Answer:
    return _json({key: state[key] for key in ("ready", "phase", "reason")}, state["ready"])


def _state(state: Snapshot) -> Answer:
    return _json(state)


def _metrics(state: Snapshot) -> Answer:
    return Answer(HTTPStatus.OK, _TEXT, exposition(state))


_ROUTES: dict[str, Callable[[Snapshot], Answer]] = {
    "/live": _live,
    "/ready": _ready,
    "/state": _state,
    METRICS: _metrics,
}


def _json(value: Any, is_yes: bool = True) -> Answer:
    return Answer(HTTPStatus.OK if is_yes else HTTPStatus.SERVICE_UNAVAILABLE, _JSON, _encode(value))


def _encode(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"
