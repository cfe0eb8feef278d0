"""Whatever a hub answers, or does not, is told in one line, and in bounded time."""

from __future__ import annotations

import errno
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expo_serve.checkpoint.hub_errors import explain, one_line, within
from expo_serve.checkpoint.source import HubAccess, find_source
from expo_serve.errors import SourceError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b"{}", "model.safetensors": b"weights"}
TOKEN = "hf_secret"
MOST_SECONDS = 12.0
Answer = Callable[["_Handler"], None]


class _Handler(BaseHTTPRequestHandler):
    """A hub with one repository, whose questions or files one answer meets."""

    protocol_version = "HTTP/1.1"
    bad: Answer | None = None
    spoiled = "/api/"
    closed = threading.Event()
    asked: list[str]

    def log_message(self, format: str, *arguments: object) -> None:
        """Not onto the tests' output."""

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        if self.bad and self.spoiled in self.path:
            self.bad(self)
            return
        if "/tree/" in self.path:
            entries = [
                {"type": "file", "oid": "0" * 40, "size": len(data), "path": name} for name, data in FILES.items()
            ]
            return self.answer(200, json.dumps(entries).encode())
        if "/api/models/" in self.path:
            siblings = [{"rfilename": name} for name in FILES]
            return self.answer(200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode())
        name = self.path.rsplit("/", 1)[-1]
        self.answer(200, FILES[name], **{"X-Repo-Commit": COMMIT, "ETag": f'"{name.encode().hex()}"'})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def tear(self) -> None:
        self.wfile.flush()
        self.closed.wait(0.1)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


def _status(status: int, body: bytes = b"", **headers: str) -> Answer:
    return lambda handler: handler.answer(status, body, **headers)


def _page(handler: _Handler) -> None:
    handler.answer(200, b"<html>log in first</html>", Content_Type="text/html")


def _torn(handler: _Handler) -> None:
    handler.answer(200, b"{", Content_Length="1000")
    handler.tear()


def _ended(handler: _Handler) -> None:
    handler.answer(200, b"{", Content_Length="1000")
    handler.close_connection = True


def _silent(handler: _Handler) -> None:
    handler.closed.wait(60)


def _dripping(handler: _Handler) -> None:
    handler.answer(200, b"{", Content_Length="100000")
    while not handler.closed.wait(0.2):
        try:
            handler.wfile.write(b" ")
        except OSError:
            return


def _circle(handler: _Handler) -> None:
    handler.answer(302, Location=handler.path)


def _no_http(handler: _Handler) -> None:
    handler.wfile.write(b"\0\1\2 this is no HTTP\r\n\r\n")
    handler.close_connection = True


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short times, and no pauses between the library's own attempts."""
    pauses = SimpleNamespace(sleep=lambda seconds: None, time=time.time, monotonic=time.monotonic)
    for name in ("huggingface_hub.utils._http.time", "huggingface_hub.file_download.time"):
        monkeypatch.setattr(name, pauses)
    monkeypatch.setattr("expo_serve.checkpoint.hub.sleep", lambda seconds: None)
    monkeypatch.setattr("expo_serve.checkpoint.hub.ANSWER_SECONDS", 2.0)
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", 1)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Handler]]:
    """A hub on this machine, which is the library's."""
    handler: Any = type("Handler", (_Handler,), {"closed": threading.Event(), "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    use(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    try:
        yield handler
    finally:
        handler.closed.set()
        server.shutdown()
        server.server_close()


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Make the library ask another hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


def refusal(cache: Path, revision: str | None = None, **access: Any) -> str:
    """The one line with which a source is refused, in bounded time."""
    began = time.monotonic()
    with pytest.raises(SourceError) as caught:
        find_source("base", "org/name", revision, HubAccess(cache_dir=str(cache), **access))
    assert time.monotonic() - began < MOST_SECONDS
    message = caught.value.message
    assert message.startswith("base: 'org/name'")
    assert "\n" not in message
    assert TOKEN not in message
    assert caught.value.exit_code == 2
    return message


BAD: dict[str, tuple[Answer, str]] = {
    "a login page": (_page, "does not answer as a hub does"),
    "a list": (_status(200, b"[]"), "could not be used: TypeError"),
    "no commit": (_status(200, b'{"id": "org/name"}'), "does not answer as a hub does"),
    "a commit that is a path": (_status(200, b'{"id": "x", "sha": "../../x"}'), "does not answer as a hub does"),
    "wrong encoding": (_status(200, b"{}", Content_Encoding="gzip"), "cannot be decoded"),
    "redirects in a circle": (_circle, "redirects in a circle"),
    "401": (_status(401, b"", X_Error_Code="RepoNotFound"), "no such repository on the hub"),
    "401, gated": (_status(401, b"", X_Error_Code="GatedRepo"), "is gated: accept its terms"),
    "403": (_status(403, b'{"error": "You may not"}'), "forbids it with status 403 (You may not)"),
    "404": (_status(404), "answers 404, not found"),
    "404, revision": (_status(404, b"", X_Error_Code="RevisionNotFound"), "has no such revision"),
    "418": (_status(418), "did not answer as expected: status 418"),
    "429": (_status(429), "too many requests"),
    "429, wait": (_status(429, b"", Retry_After="30"), "try again in 30 s"),
    "429, wait long": (_status(429, b"", Retry_After="3600"), "try again in 3600 s"),
    "500": (_status(500, b"<html>sorry</html>"), "is out of order (status 500)"),
    "503": (_status(503), "is out of order (status 503)"),
    "torn": (_torn, "broke off"),
    "ended too early": (_ended, "broke off"),
    "silent": (_silent, "is silent"),
    "one byte now and then": (_dripping, "no whole answer in 2 s"),
    "no HTTP": (_no_http, "broke off"),
}


@pytest.mark.parametrize(("bad", "words"), BAD.values(), ids=BAD)
def test_bad_answer_to_the_question_is_one_line(hub: type[_Handler], tmp_path: Path, bad: Answer, words: str) -> None:
    hub.bad = staticmethod(bad)
    assert words in refusal(tmp_path)


BAD_FILES: dict[str, tuple[Answer, str]] = {
    **{name: BAD[name] for name in ("redirects in a circle", "429, wait long", "503", "silent", "no HTTP")},
    "a login page": (_page, "does not answer as a hub does"),
    "403": (_status(403, b"", X_Error_Message="You may not"), "forbids it with status 403 (You may not)"),
    "404": (_status(404, b"", X_Error_Code="EntryNotFound"), "answers 404, not found"),
    "wrong encoding": (_status(200, b"{}", Content_Encoding="gzip", X_Repo_Commit=COMMIT, ETag='"x"'), "decoded"),
    "another size": (
        lambda handler: handler.answer(200, b"{", X_Repo_Commit=COMMIT, ETag='"x"', X_Linked_Size="9"),
        "has not the size that it announced",
    ),
}


@pytest.mark.parametrize(("bad", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_answer_for_a_file_is_one_line(hub: type[_Handler], tmp_path: Path, bad: Answer, words: str) -> None:
    hub.bad, hub.spoiled = staticmethod(bad), "/resolve/"
    assert words in refusal(tmp_path)
    assert not list(tmp_path.rglob("*.incomplete"))


@pytest.mark.parametrize("bad", [_torn, _ended, _silent], ids=["torn", "ended", "silent"])
def test_file_that_breaks_off_is_one_line(hub: type[_Handler], tmp_path: Path, bad: Answer) -> None:
    def broken(handler: _Handler) -> None:
        if handler.command == "HEAD":
            return handler.answer(200, b"", X_Repo_Commit=COMMIT, ETag='"weights"', Content_Length="1000")
        bad(handler)

    hub.bad, hub.spoiled = staticmethod(broken), "/model.safetensors"
    message = refusal(tmp_path)
    assert "broke off" in message or "is silent" in message


def test_good_hub_is_asked_no_more_than_needed(hub: type[_Handler], tmp_path: Path) -> None:
    found = find_source("base", "org/name", None, HubAccess(cache_dir=str(tmp_path)))
    assert (found.name, found.revision) == ("org/name", COMMIT)
    assert sorted(path.name for path in Path(found.path).iterdir()) == sorted(FILES)
    assert len(hub.asked) == len(set(hub.asked)) == 2 + 2 * len(FILES)
    hub.asked.clear()
    assert find_source("base", "org/name", COMMIT, HubAccess(cache_dir=str(tmp_path))) == found
    assert hub.asked == []


def test_short_wait_that_the_hub_asks_for_is_kept_once(
    hub: type[_Handler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("expo_serve.checkpoint.hub.sleep", waited.append)
    hub.bad = staticmethod(_status(429, b"", Retry_After="30"))
    refusal(tmp_path)
    assert waited == [30.0]
    assert len(hub.asked) == 2


@pytest.mark.parametrize("code", ["", "RepoNotFound"])
def test_token_that_has_expired_is_named(hub: type[_Handler], tmp_path: Path, code: str) -> None:
    said = "User Access Token 'mine' is expired" if code else "Invalid credentials in Authorization header"
    hub.bad = staticmethod(_status(401, b"", X_Error_Message=said, **({"X_Error_Code": code} if code else {})))
    message = refusal(tmp_path, token=TOKEN)
    assert "refuses the token that comes from --hf-token" in message
    assert said in message
    assert "/settings/tokens" in message


@pytest.mark.parametrize("token", ["hf_a b", "hf_é", "hf_a\nb"])
def test_token_that_cannot_be_one_is_refused(hub: type[_Handler], tmp_path: Path, token: str) -> None:
    message = refusal(tmp_path, token=token)
    assert "--hf-token has a character" in message
    assert token not in message
    assert hub.asked == []


def test_stored_token_that_is_not_there_is_named(
    hub: type[_Handler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "run 'hf auth login'" in refusal(tmp_path, token=True)


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("hub.example", "expected an address: HF_ENDPOINT=https://hub.example"),
        ("http://127.0.0.1:1", "cannot be reached: http://127.0.0.1:1"),
        ("http://user:word@127.0.0.1:1", "cannot be reached: http://127.0.0.1:1"),
        ("http://[::1", "is no address of a hub"),
        ("http://", "http:"),
    ],
)
def test_endpoint_that_is_none_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, words: str
) -> None:
    use(monkeypatch, endpoint)
    message = refusal(tmp_path)
    assert words in message
    assert "word@" not in message


def test_proxy_that_refuses_is_named(hub: type[_Handler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import close_session  # type: ignore[attr-defined]

    port = hub_port()
    use(monkeypatch, "https://hub.example")
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("NO_PROXY", "")
    close_session()
    try:
        assert "the proxy refuses" in refusal(tmp_path)
    finally:
        close_session()


def hub_port() -> int:
    """The port of the hub in use: it knows no CONNECT, as a proxy that refuses."""
    from huggingface_hub import constants

    return int(constants.ENDPOINT.rsplit(":", 1)[1])


def test_cache_that_is_no_folder_is_named(hub: type[_Handler], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(tmp_path / "file")
    assert f"the hub cache {tmp_path / 'file'} cannot be used" in message
    assert "--download-dir" in message


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_disk_that_takes_no_file_is_named(
    hub: type[_Handler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*given: object, **more: object) -> None:
        raise OSError(number, "as the system says it", str(tmp_path / "blobs"))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    message = refusal(tmp_path)
    assert f"the hub cache {tmp_path} cannot be used" in message
    assert "make room or give another folder" in message


def test_any_other_error_of_the_library_is_named(
    hub: type[_Handler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object, **more: object) -> None:
        raise LookupError("first line\nsecond line")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", broken)
    assert refusal(tmp_path).endswith("could not be used: LookupError: first line")


def test_interrupt_passes(hub: type[_Handler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.snapshot_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_source("base", "org/name", None, HubAccess(cache_dir=str(tmp_path)))


def test_session_is_left_as_it_was(hub: type[_Handler], tmp_path: Path) -> None:
    from huggingface_hub import get_session

    before = {kind: list(hooks) for kind, hooks in get_session().event_hooks.items()}
    find_source("base", "org/name", None, HubAccess(cache_dir=str(tmp_path)))
    assert get_session().event_hooks == before


def test_lines_hold_no_secret() -> None:
    assert one_line("bad header 'Bearer hf_x' for http://me:word@host/file?Signature=x\nmore") == (
        "bad header 'Bearer ...' for http://host/file"
    )
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line("x" * 5000)) <= 300


def test_call_that_takes_too_long_is_left_behind() -> None:
    over = threading.Event()
    with pytest.raises(TimeoutError, match="no whole answer in 0 s"):
        within(0.05, lambda: over.wait(30))
    over.set()
    assert within(5, lambda: 3) == 3


def test_error_of_another_thread_is_the_callers() -> None:
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)


def test_every_error_has_a_line(tmp_path: Path) -> None:
    from huggingface_hub import errors

    for error in (OSError(), ValueError("x"), RuntimeError("No space left on device (os error 28)"), Exception()):
        assert explain(error, "https://hub", str(tmp_path), None).reason
    assert "cannot be used" in explain(RuntimeError("No space left on device"), "", "", None).reason
    assert explain(errors.HFValidationError("bad"), "https://hub", "", None).is_final
