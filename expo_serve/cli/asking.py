"""Asking a server for JSON over HTTP, whatever it answers: one request, no redirect, bounded time and size.

For readiness probes, so with the standard library only. :mod:`urllib.request` is no choice: it sends the API key after
redirects to any host.
"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar
from urllib.parse import SplitResult, urlsplit

from expo_serve.errors import ServeError, UsageError
from expo_serve.keys import VARIABLE, as_in_header, check_key

MAX_BYTES = 4 << 20
"""Largest answer; a report takes about 1.5 kB for each rank."""
_SHOWN = 200
"""Characters of a server's text that a message shows."""
_GRACE_SECONDS = 1.0
"""By which a socket waits longer than the caller, whose message is the better one."""

Answer = TypeVar("Answer")


class Server(NamedTuple):  # a dataclass would double what is imported
    """Where a server is, and the key that it is shown."""

    url: str
    """The root, without a slash at its end."""
    is_encrypted: bool
    host: str
    port: int
    path: str
    """Of the root: mostly empty."""
    key: str | None
    """Sent to this host and port only."""

    def ask(self, path: str, seconds: float, *, headers: Mapping[str, str] | None = None, body: Any = None) -> Any:
        """Send a GET request, or a POST request if there is a body; returns the JSON of the answer.

        Args:
            path: of the route, under the root.
            seconds: for which the caller waits (:func:`within`); a socket that nobody waits for is closed soon after.
            headers: more headers.
            body: JSON value.

        Raises:
            ServeError: the server does not answer, or answers with anything but status 200 and JSON.
        """
        where = f"{self.url}{path}"
        try:
            content = self._exchange(path, seconds, headers or {}, body)
        except OSError as error:
            raise ServeError(f"{where} does not answer: {printable(error) or type(error).__name__}") from None
        except (ValueError, http.client.HTTPException) as error:
            kind = type(error).__name__
            raise ServeError(f"{where} gives no proper HTTP answer ({kind}: {printable(error)})") from None
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ServeError(f"{where} answers with something that is not JSON: {printable(error)}") from None

    def _exchange(self, path: str, seconds: float, headers: Mapping[str, str], body: Any) -> bytes:
        connect = http.client.HTTPSConnection if self.is_encrypted else http.client.HTTPConnection
        connection = connect(self.host, self.port, timeout=seconds + _GRACE_SECONDS)
        sent: dict[str, str | bytes] = {"Content-Type": "application/json", "Connection": "close", **headers}
        if self.key is not None:
            sent["Authorization"] = b"Bearer " + as_in_header(self.key).encode("latin-1")
        try:
            method, content = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
            connection.request(method, f"{self.path}{path}", content, sent)
            with connection.getresponse() as response:
                _check_status(f"{self.url}{path}", response)
                found = response.read(MAX_BYTES + 1)
        finally:
            connection.close()
        if len(found) > MAX_BYTES:
            raise ServeError(f"{self.url}{path} answers with more than {MAX_BYTES >> 20} MiB")
        return found


def _check_status(where: str, response: http.client.HTTPResponse) -> None:
    location = response.getheader("Location")
    if 300 <= response.status < 400 and location is not None:
        raise ServeError(
            f"{where} redirects to {printable(location)} ({response.status}), but no redirect is followed, "
            "since the API key is for this server only; give the address of the server itself as --url"
        )
    if response.status != 200:
        hint = f"; the API key is taken from {VARIABLE}" if response.status == 401 else ""
        raise ServeError(f"{where} answered {response.status} {printable(response.reason)}".rstrip() + hint)


def parse_url(url: str, environment: Mapping[str, str]) -> Server:
    """Read the root of a server from a URL, and its API key from the variable ``VLLM_API_KEY``.

    Raises:
        UsageError: the URL is none, or holds more than scheme, host, port and path; or the key is empty.
    """
    parts, port = _split(url)
    if "@" in parts.netloc:
        raise UsageError(f"--url: leave name and password out; the API key is taken from {VARIABLE}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or port == 0:
        raise _no_url(url)
    key = environment.get(VARIABLE)
    if key is not None:
        check_key(key, VARIABLE)
    is_encrypted = parts.scheme == "https"
    return Server(
        url=url.rstrip("/"),
        is_encrypted=is_encrypted,
        host=parts.hostname,
        port=port or (443 if is_encrypted else 80),
        path=parts.path.rstrip("/"),
        key=key,
    )


def _split(url: str) -> tuple[SplitResult, int | None]:
    """Return the parts of a URL, which a request line can hold, and its port."""
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna")
        parts.path.encode("ascii")
        if url.isprintable() and " " not in url:
            return parts, parts.port
    except ValueError:  # brackets that are not closed, a port out of range, a label that is too long
        pass
    raise _no_url(url)


def _no_url(url: str) -> UsageError:
    """Return the error for a URL that is none; it does not show what may be a password."""
    shown = "" if "@" in url else f", found {url!r:.{_SHOWN}}"
    return UsageError(f"--url: expected http://HOST:PORT{shown}")


def within(seconds: float, what: str, work: Callable[[], Answer]) -> Answer:
    """Return what some work returns, or raise what it raises; given up when the time is over.

    The work gets a thread of its own, which the end of the process does not wait for: nothing else bounds the resolver
    of names, nor a server that sends a byte now and then.

    Raises:
        ServeError: the time is over; the message begins with ``what``.
    """
    outcomes: list[Answer | BaseException] = []

    def run() -> None:
        try:
            outcomes.append(work())
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            outcomes.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcomes:
        raise ServeError(f"{what} did not answer within {seconds:g} s")
    if isinstance(outcomes[0], BaseException):
        raise outcomes[0]
    return outcomes[0]


def printable(value: object) -> str:
    """Return text that comes from a server for one line of a terminal: cut, and without a control character."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(value)[:_SHOWN]
    )
