"""Turns whatever a call of the hub's library raises into one line, and bounds how long such a call may take.

The library's exceptions come from three HTTP clients, according to its version; they are told by the names of their
classes, so that none of the clients is imported here.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from time import time
from typing import Any, TypeVar

MAX_WAIT_SECONDS = 60.0
"""The longest time that a hub may ask for before the next request."""
_MAX_REFUSALS = 2
_DISK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EEXIST}
    | {errno.ENAMETOOLONG, errno.EISDIR, errno.ESTALE, errno.EFBIG}
)
_DISK_WORDS = re.compile("No space left on device|Read-only file system|Permission denied|Disk quota exceeded")
_TOKEN_WORDS = re.compile("credential|token|expired", re.IGNORECASE)
_TORN = frozenset(("ReadError", "WriteError", "RemoteProtocolError", "ChunkedEncodingError", "IncompleteRead"))
_SECRETS = ((re.compile(r"Bearer\s+[^\s'\"]+"), "Bearer ..."), (re.compile(r"://[^/@\s]+@"), "://"))
_QUERY = re.compile(r"\?[^\s'\"]*")
_MAX_LINE = 300
UNREACHABLE = "the hub cannot be reached"
"""How the reason begins if there was no answer at all."""

T = TypeVar("T")


class HubFailure(Exception):
    """A call of the hub's library that did not succeed.

    Args:
        reason: what went wrong and what to do, in one line.
        is_final: True if a copy in the cache would not be what was asked for.
        wait: seconds after which to ask once more; None if that would not help.
    """

    def __init__(self, reason: str, *, is_final: bool = False, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_final = is_final
        self.wait = wait


class _TooManyRequestsError(Exception):
    """The hub asks to wait longer, or more often, than we do."""

    def __init__(self, response: Any) -> None:
        super().__init__("429")
        self.response = response


def explain(error: Exception, endpoint: str, cache: str, token: str | bool | None) -> HubFailure:
    """Say in one line why a call of the hub's library failed.

    Args:
        error: what it raised.
        endpoint: address of the hub.
        cache: folder of downloads.
        token: as the user gave it.
    """
    error = _cause(error)
    name, hub = _names(error), one_line(endpoint)
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(status, int):
        return _explain_status(error, status, response, hub, token)
    if "LocalTokenNotFoundError" in name:
        return HubFailure("a token is asked for, but none is stored: run 'hf auth login', or give --hf-token TOKEN")
    if "HFValidationError" in name:
        return HubFailure(f"expected a folder or a hub id (ORGANISATION/NAME): {one_line(error)}", is_final=True)
    return _explain_disk(error, cache) or _explain_network(error, name, hub)


def one_line(error: object) -> str:
    """Return the first line of an error's message, without what must not be printed: tokens and signed addresses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    for pattern, instead in _SECRETS:
        line = pattern.sub(instead, line)
    return _QUERY.sub("", line)[:_MAX_LINE]


def _cause(error: Exception) -> Exception:
    """Return the error that the library wrapped into one that speaks of its cache."""
    while "LocalEntryNotFoundError" in _names(error) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _names(error: Exception) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _explain_status(error: Exception, status: int, response: Any, hub: str, token: str | bool | None) -> HubFailure:
    names, message = _names(error), _message(error, response)
    if "GatedRepoError" in names:
        return HubFailure(f"the repository is gated: accept its terms at {hub} and give the account's --hf-token")
    if status == 401 and _has_token(response) and _TOKEN_WORDS.search(message):
        return HubFailure(
            f"the hub refuses the token that comes from {_origin(token)} ({message}): it has expired or is wrong; "
            f"make a new one at {hub}/settings/tokens, or leave it out for a public repository"
        )
    if "RepositoryNotFoundError" in names or (status == 401 and not _has_token(response)):
        return HubFailure("no such folder, and no such repository on the hub (a private one needs --hf-token)")
    if "RevisionNotFoundError" in names:
        return HubFailure("the hub has no such revision", is_final=True)
    if "DisabledRepoError" in names:
        return HubFailure("the hub has disabled the repository")
    said = f" ({message})" if message else ""
    match status:
        case 401 | 403:
            return HubFailure(
                f"the hub forbids it with status {status}{said}: the token from {_origin(token)} needs leave to read "
                f"this repository: {hub}/settings/tokens"
            )
        case 404:
            return HubFailure(f"{hub} answers 404, not found{said}: check the name, and HF_ENDPOINT if it is set")
        case 407:
            return HubFailure("the proxy wants a password: check HTTPS_PROXY and NO_PROXY")
        case 429:
            wait = _retry_after(response)
            hint = f"try again in {wait:.0f} s" if wait is not None else "try again later"
            is_short = wait is None or wait <= MAX_WAIT_SECONDS
            return HubFailure(
                f"the hub has too many requests from this address (429); {hint}, or give --hf-token",
                wait=(1.0 if wait is None else wait) if is_short else None,
            )
        case _ if status >= 500:
            return HubFailure(f"{hub} is out of order (status {status}{said}); try again later", wait=1.0)
    return HubFailure(f"{hub} did not answer as expected: status {status}{said}")


def _message(error: Exception, response: Any) -> str:
    """Return what the hub itself says; an HTML page says nothing."""
    found = getattr(error, "server_message", None) or response.headers.get("X-Error-Message") or ""
    return "" if not found or "<" in found else one_line(found)


def _has_token(response: Any) -> bool:
    try:
        return "authorization" in {key.lower() for key in response.request.headers}
    except (AttributeError, RuntimeError):  # an answer that belongs to no request
        return False


def _origin(token: str | bool | None) -> str:
    return "--hf-token" if isinstance(token, str) else "HF_TOKEN or 'hf auth login'"


def _retry_after(response: Any) -> float | None:
    """Return for how many seconds the hub asks to wait."""
    given = response.headers.get("Retry-After", "").strip()
    if given.isascii() and given.isdigit():
        return float(given)
    try:
        return max(0.0, parsedate_to_datetime(given).timestamp() - time())
    except (ValueError, TypeError, OverflowError):  # no date either
        return None


def _explain_disk(error: Exception, cache: str) -> HubFailure | None:
    """Say which folder cannot be written; None if the error is not the disk's."""
    number = error.errno if isinstance(error, OSError) else None
    words = _DISK_WORDS.search(str(error))
    if number not in _DISK_ERRORS and not words:
        return None
    what = words[0] if words else os.strerror(number or 0)
    where = getattr(error, "filename", None)
    at = f" ({where})" if isinstance(where, str) and where and where != cache else ""
    return HubFailure(
        f"the hub cache {cache} cannot be used: {what}{at}; make room or give another folder: --download-dir"
    )


def _explain_network(error: Exception, names: set[str], hub: str) -> HubFailure:
    line = one_line(error)
    if "ProxyError" in names:
        return HubFailure(f"the proxy refuses: {line}; check HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY")
    if names & {"UnsupportedProtocol", "InvalidURL", "MissingSchema", "InvalidSchema"}:
        return HubFailure(f"{hub!r} is no address of a hub: {line}; expected HF_ENDPOINT=https://HOST")
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return HubFailure(f"the certificate of {hub} is not trusted; set SSL_CERT_FILE to the one of your network")
    if names & {"TimeoutException", "Timeout", "TimeoutError"}:
        return HubFailure(
            f"{UNREACHABLE}: {hub} is silent ({line}); "
            "HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT set for how many seconds it may be"
        )
    if "TooManyRedirects" in names:
        return HubFailure(f"{hub} redirects in a circle; check HF_ENDPOINT and the proxy")
    if names & {"DecodingError", "ContentDecodingError"}:
        return HubFailure(f"the answer of {hub} cannot be decoded ({line}); check HF_ENDPOINT and the proxy")
    if names & _TORN or isinstance(error, ConnectionResetError):
        return HubFailure(
            f"the connection to {hub} broke off ({line}); run it again: finished files are kept", wait=1.0
        )
    if names & {"ConnectError", "ConnectionError", "gaierror", "NetworkError", "HTTPError"}:
        return HubFailure(f"{UNREACHABLE}: {hub}: {line}")
    if names & {"JSONDecodeError", "FileMetadataError", "UnicodeDecodeError"}:
        return HubFailure(
            f"{hub} does not answer as a hub does ({line}); a login page of the network or a wrong HF_ENDPOINT may "
            "be in its place"
        )
    if "EntryNotFoundError" in names:
        return HubFailure(f"{UNREACHABLE}: {line}")
    if "Consistency check failed" in line:
        return HubFailure(f"a file from {hub} has not the size that it announced ({line}); run it again", wait=1.0)
    return HubFailure(f"the answer of {hub} could not be used: {type(error).__name__}: {line}")


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return what ``call`` returns, in another thread; it is left behind if it takes longer.

    Args:
        seconds: the longest time.
        call: takes no arguments.

    Raises:
        TimeoutError: it took longer.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:  # noqa: BLE001 - the caller gets it
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no whole answer in {seconds:.0f} s")
    return results[0]


@contextmanager
def bounded_requests(session: Any, seconds: float) -> Iterator[None]:
    """Bound each request of the hub's library: where it sets no timeout, and how long it waits at the hub's wish.

    Args:
        session: the library's HTTP client; one without hooks is left as it is.
        seconds: the longest silence.
    """
    hooks = getattr(session, "event_hooks", None)
    if hooks is None:
        yield
        return
    refusals: Counter[str] = Counter()

    def before(request: Any) -> None:
        timeouts = request.extensions.get("timeout") or {}
        for kind in ("connect", "read", "write", "pool"):
            given = timeouts.get(kind)
            timeouts[kind] = seconds if given is None else min(given, seconds)
        request.extensions["timeout"] = timeouts

    def after(response: Any) -> None:
        if response.status_code == 429:
            address = f"{response.request.method} {response.request.url}"
            refusals[address] += 1
            if refusals[address] > _MAX_REFUSALS or (_retry_after(response) or 0) > MAX_WAIT_SECONDS:
                raise _TooManyRequestsError(response)

    session.event_hooks = {"request": [*hooks["request"], before], "response": [*hooks["response"], after]}
    try:
        yield
    finally:
        session.event_hooks = hooks
