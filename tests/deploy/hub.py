"""A model hub on this machine: of the real one's protocol what ``hf download`` and ``hf cache verify`` use.

As there, large files (LFS) come from another origin, to which the token must not go, and a commit never changes. Its
Xet protocol is not spoken: files come by plain HTTP.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

_LFS = (".safetensors", ".bin")
_API = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)/(?P<what>revision|tree)/(?P<revision>[^/]+)")
_RESOLVE = re.compile(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_RANGE = re.compile(r"bytes=(\d+)-")
_NO_AGENTS: dict[str, Any] = {"standardEnvVars": [], "harnesses": {}}


@dataclass(frozen=True)
class File:
    """One file of a commit, with the names that git and LFS have for its content."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def stored(self) -> bytes:
        """What git has: of a large file only a pointer."""
        if not self.lfs:
            return self.content
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @property
    def blob(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.stored) + self.stored).hexdigest()

    @property
    def checksum(self) -> str:
        """The name of its blob in the cache."""
        return self.sha256 if self.lfs else self.blob

    def entry(self, path: str) -> dict[str, Any]:
        """As a tree lists it."""
        entry = {"type": "file", "oid": self.blob, "size": len(self.content), "path": path}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.stored)}
        return entry


@dataclass
class Repository:
    """Its commits, what ``main`` is, and whether one needs leave to read it."""

    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    main: str = ""
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        found = self.main if revision == "main" else revision
        return found if found in self.commits else None


@dataclass(frozen=True)
class Request:
    """One that was asked. ``file`` is None for what is not a file; ``start`` is where a range begins."""

    method: str
    repository: str
    file: str | None
    start: int | None
    token: str | None
    from_cdn: bool = False


@dataclass
class Trouble:
    """What befalls a file on its way: a bit is another, or the connection is closed, torn or silent after ``at``."""

    how: Literal["close", "tear", "hang", "damage"]
    at: int = 0
    times: int = 1


class Hub:
    """Serves until :meth:`close`; ``watch`` is called before each answer."""

    def __init__(self, token: str | None = None) -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.troubles: dict[str, Trouble] = {}
        self.watch: Callable[[Request], None] = lambda request: None
        self.closed = threading.Event()
        self._api, self.url = self._serve(_Api)
        self._cdn, self.cdn_url = self._serve(_Cdn)

    def add(self, name: str, folder: Path, *, gated: bool = False) -> str:
        """Make a commit of a folder, and ``main`` that commit."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {
            path.relative_to(folder).as_posix(): File(path.read_bytes(), path.name.endswith(_LFS)) for path in paths
        }
        listing = "".join(f"{path} {file.blob}\n" for path, file in files.items())
        commit = hashlib.sha1(f"{name}\n{listing}".encode()).hexdigest()
        repository = self.repositories.setdefault(name, Repository(gated=gated))
        repository.commits[commit], repository.main = files, commit
        return commit

    def downloads(self) -> list[str]:
        """Which files were asked for, as ``org/name/path``, in their order."""
        return [f"{one.repository}/{one.file}" for one in self.requests if one.method == "GET" and one.file]

    def note(self, request: Request) -> None:
        self.requests.append(request)
        self.watch(request)

    def trouble(self, file: str) -> Trouble | None:
        """The trouble that a file's next answer has."""
        trouble = self.troubles.get(file)
        if trouble is None or trouble.times == 0:
            return None
        trouble.times -= 1
        return trouble

    def close(self) -> None:
        self.closed.set()
        for server in (self._api, self._cdn):
            server.shutdown()
            server.server_close()

    def _serve(self, handler: type[_Handler]) -> tuple[ThreadingHTTPServer, str]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": self}))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return server, f"http://127.0.0.1:{server.server_port}"


@contextmanager
def running_hub(token: str | None = None) -> Iterator[Hub]:
    """A hub for the length of a ``with``."""
    hub = Hub(token)
    try:
        yield hub
    finally:
        hub.close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        """Not onto the tests' output."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        raise NotImplementedError

    def note(self, repository: str, file: str | None, *, from_cdn: bool = False) -> None:
        self.hub.note(Request(self.command, repository, file, self.start(), self.given_token(), from_cdn))

    def given_token(self) -> str | None:
        header = self.headers.get("Authorization")
        return header.removeprefix("Bearer ") if header else None

    def start(self) -> int | None:
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        return int(match[1]) if match else None

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def answer_json(self, content: object) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def refuse(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.answer(status, headers, json.dumps({"error": message}).encode())

    def answer_file(self, name: str, file: File, headers: dict[str, str]) -> None:
        """Its bytes, from where the range begins; with the trouble that lies on it."""
        start, size = self.start() or 0, len(file.content)
        if start >= size > 0:
            return self.answer(416, {"Content-Range": f"bytes */{size}"})
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        status = 200
        if start:
            status, headers["Content-Range"] = 206, f"bytes {start}-{size - 1}/{size}"
        trouble = self.hub.trouble(name) if self.command == "GET" else None
        if trouble is None:
            return self.answer(status, headers, file.content[start:])
        if trouble.how == "damage":
            middle = start + (size - start) // 2
            changed = bytes([file.content[middle] ^ 1])
            return self.answer(status, headers, file.content[start:middle] + changed + file.content[middle + 1 :])
        self.answer(status, {**headers, "Content-Length": str(size - start)}, file.content[start : trouble.at])
        self.break_off(trouble)

    def break_off(self, trouble: Trouble) -> None:
        self.wfile.flush()
        if trouble.how == "hang":
            self.hub.closed.wait()
        if trouble.how == "tear":
            # What was sent must have arrived: a torn connection takes it back.
            self.hub.closed.wait(0.2)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True


class _Api(_Handler):
    """The hub itself."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/api/agent-harnesses":
            return self.answer_json(_NO_AGENTS)
        match = _API.fullmatch(path) or _RESOLVE.fullmatch(path)
        if not match:
            return self.refuse(404, "Not found")
        parts = match.groupdict()
        file = unquote(parts["file"]) if "file" in parts else None
        self.note(parts["id"], file)
        if self.given_token() not in (None, self.hub.token):
            # Also where nobody needs one.
            return self.refuse(401, "Invalid credentials in Authorization header")
        repository = self.hub.repositories.get(parts["id"])
        if repository is None:
            return self.refuse(401, "Repository not found", "RepoNotFound")
        commit = repository.commit(unquote(parts["revision"]))
        if commit is None:
            return self.refuse(404, f"Invalid rev id: {parts['revision']}", "RevisionNotFound")
        if file is not None:
            return self.resolve(parts["id"], repository, commit, file)
        self.describe(parts["id"], repository, commit, parts["what"])

    def describe(self, name: str, repository: Repository, commit: str, what: str) -> None:
        """Everybody may see which files a repository has, also a gated one's."""
        files = repository.commits[commit]
        if what == "tree":
            folders = {parent.as_posix() for path in files for parent in Path(path).parents if parent.name}
            entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in sorted(folders)]
            return self.answer_json(entries + [file.entry(path) for path, file in files.items()])
        siblings = [{"rfilename": path} for path in files]
        gated = "manual" if repository.gated else False
        self.answer_json({"id": name, "sha": commit, "private": False, "gated": gated, "siblings": siblings})

    def resolve(self, name: str, repository: Repository, commit: str, path: str) -> None:
        """A small file itself, or where a large one lies."""
        if repository.gated and self.given_token() is None:
            return self.refuse(401, f"Access to model {name} is restricted. You must be authenticated.", "GatedRepo")
        file = repository.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit}
        if file is None:
            return self.answer(404, {**headers, "X-Error-Code": "EntryNotFound"})
        if not file.lfs:
            return self.answer_file(f"{name}/{path}", file, {**headers, "ETag": f'"{file.blob}"'})
        linked = {"X-Linked-Size": str(len(file.content)), "X-Linked-Etag": f'"{file.sha256}"'}
        self.answer(302, {**headers, **linked, "Location": f"{self.hub.cdn_url}/{name}/resolve/{commit}/{path}"})


class _Cdn(_Handler):
    """Where large files lie. Who has the address may read."""

    def do_GET(self) -> None:
        match = _RESOLVE.fullmatch(urlsplit(self.path).path)
        assert match, self.path
        name, path = match["id"], unquote(match["file"])
        self.note(name, path, from_cdn=True)
        file = self.hub.repositories[name].commits[match["revision"]][path]
        self.answer_file(f"{name}/{path}", file, {"ETag": f'"{file.sha256}"'})
