"""Draws what a hostile client sends: odd headers, paths, methods, bodies, chunks, pipelines and upgrades."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from loadtests.fuzz import http_values as odd
from loadtests.fuzz.changes import change_json
from loadtests.fuzz_pickle import change_bytes

Header = tuple[bytes, bytes]
_JSON: Header = (b"Content-Type", b"application/json")


@dataclass(frozen=True)
class Message:
    """What is sent over one connection, and what is known about it."""

    kind: str
    parts: tuple[bytes, ...]
    """Sent one after the other, with a moment between them."""
    has_key: bool = False
    """Whether any of its requests has the key."""
    asks_other_alpha: bool = False
    """Whether each of its requests asks for an alpha that is not served."""
    method: str = ""
    """Of the first request; empty where it is none."""
    is_whole: bool = False
    """Whether the server has all that it needs for an answer, and closes the connection after it."""

    @property
    def raw(self) -> bytes:
        """All bytes."""
        return b"".join(self.parts)


class Drawer:
    """Draws messages.

    Args:
        routes: methods and paths of the server.
        key: the API key.
        chance: decides.
    """

    def __init__(self, routes: Sequence[tuple[str, str]], key: str, chance: random.Random) -> None:
        self._routes, self._chance = list(routes), chance
        self._authorization = f"Bearer {key}".encode()

    def draw(self) -> Message:
        """Return the next message."""
        kinds: dict[Callable[[], Message], int] = {
            self.path: 4, self.body: 8, self.header: 3, self.alpha: 2, self.chunks: 3, self.smuggled: 2,
            self.pipeline: 1, self.upgrade: 2, self.garbage: 2,
        }  # fmt: skip
        return self._chance.choices(list(kinds), list(kinds.values()))[0]()

    def path(self) -> Message:
        """A path in an odd spelling: mostly without the key, since no spelling may open a route."""
        chance = self._chance
        method, route = chance.choice(self._routes)
        escaped = "/" + "".join(f"%{ord(character):02x}" for character in route[1:])
        spellings = (route, quote(route, safe=""), route.upper(), route.replace("/", "//"), route[1:], escaped)
        path = (chance.choice(odd.PREFIXES) + chance.choice(spellings) + chance.choice(odd.SUFFIXES)).encode()
        if chance.random() < 0.15:
            path = change_bytes(path, chance).replace(b"\n", b"")
        verb = chance.choice(odd.METHODS) if chance.random() < 0.4 else method.encode()
        return self._whole("path", verb, path or b"/", has_key=chance.random() < 0.2)

    def body(self) -> Message:
        """A body that is odd, in its types, its values or its bytes."""
        chance = self._chance
        posts = [path for method, path in self._routes if method in ("POST", "PUT", "PATCH")]
        route = chance.choice(list(odd.BODIES) if chance.random() < 0.8 else posts)
        body = self._odd_body(odd.BODIES.get(route, odd.BODIES["/v1/completions"]))
        headers = [_JSON if chance.random() < 0.9 else (_JSON[0], chance.choice(odd.BODY_KINDS))]
        return self._whole("body", b"POST", route.encode(), headers, body, has_key=chance.random() < 0.9)

    def _odd_body(self, seed: dict[str, Any]) -> bytes:
        chance = self._chance
        more = chance.choices(list(odd.MORE_KEYS), k=chance.choice((0, 1, 1, 2)))
        content = json.dumps({**seed, **{key: chance.choice(odd.MORE_KEYS[key]) for key in more}}).encode()
        which = chance.random()
        if which < 0.5:
            return content
        return change_json(content, chance) if which < 0.92 else chance.choice(odd.ODD_BODIES)

    def header(self) -> Message:
        """Odd headers around a plain request."""
        chance = self._chance
        method, route = chance.choice(self._routes)
        headers = chance.sample(odd.HEADERS, chance.choice((1, 1, 2, 3))) * chance.choice((1, 1, 1, 1, 2, 50))
        has_key = chance.random() < 0.3
        raw = self._head(method.encode(), route.encode(), headers, has_key=has_key)
        return Message("header", (raw,), has_key, method=method)

    def alpha(self) -> Message:
        """A request for another alpha, which must not be answered; now and then one for this alpha too."""
        chance = self._chance
        names = (b"X-Expo-Alpha", b"x-expo-alpha", b"X-EXPO-ALPHA")
        headers = [(chance.choice(names), chance.choice(odd.OTHER_ALPHAS))]
        if chance.random() < 0.5:
            headers.insert(chance.randrange(2), (names[0], chance.choice(odd.SAME_ALPHAS)))
        method, route = chance.choice([*self._routes, ("POST", "/v1/completions")])
        body = json.dumps(odd.BODIES.get(route, {})).encode() if method == "POST" else b""
        has_key = chance.random() < 0.9
        sent = self._whole("alpha", method.encode(), route.encode(), [*headers, _JSON], body, has_key=has_key)
        return Message(sent.kind, sent.parts, has_key, asks_other_alpha=True, method=method, is_whole=True)

    def chunks(self) -> Message:
        """A body in chunks, with sizes, extensions or trailers that are odd."""
        chance = self._chance
        has_key = chance.random() < 0.8
        coding = (b"Transfer-Encoding", chance.choice(odd.CODINGS))
        head = self._head(b"POST", b"/v1/completions", [coding], has_key=has_key)
        chunk = chance.choice(odd.CHUNK_SIZES) + b"\r\n" + odd.CHUNK_BODY + b"\r\n"
        parts = (head, chunk, chance.choice(odd.CHUNK_ENDS) + chance.choice(odd.TRAILERS) + b"\r\n")
        return Message("chunks", parts if chance.random() < 0.5 else (b"".join(parts),), has_key, method="POST")

    def smuggled(self) -> Message:
        """A request with the key in whose body, by one of two readings, another one without the key is hidden."""
        chance = self._chance
        inner = f"GET {odd.SECRET_ROUTE} HTTP/1.1\r\nHost: x\r\nX: yyyyyyyy\r\n\r\n".encode()
        in_chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(inner), inner)
        body = chance.choice((b"0\r\n\r\n" + inner, b"5\r\nhello\r\n0\r\n\r\n" + inner, inner, in_chunk))
        length, whole = chance.choice((len(body), 0, 4, 6, len(body) - len(inner))), len(body)
        coding = (chance.choice(odd.SMUGGLED_NAMES), chance.choice(odd.SMUGGLED_CODINGS))
        headers = chance.choice((
            [(b"Content-Length", b"%d" % length), coding],
            [coding, (b"Content-Length", b"%d" % length)],
            [(b"Content-Length", b"%d" % length), (b"Content-Length", b"%d" % whole)],
            [(b"Content-Length", b"%d, %d" % (length, whole))],
        ))  # fmt: skip
        method = chance.choice((b"GET", b"POST"))
        head = self._head(method, b"/v1/models", headers, has_key=True)
        return Message("smuggled", (head + body,), has_key=True, method=method.decode())

    def pipeline(self) -> Message:
        """Several requests at once, none with the key."""
        chance = self._chance
        paths = [chance.choice(self._routes)[1].encode() for _ in range(chance.choice((2, 5, 40)))]
        return Message("pipeline", (b"".join(self._head(b"GET", path) for path in paths),), method="GET")

    def upgrade(self) -> Message:
        """An upgrade to a websocket, or to HTTP/2."""
        chance = self._chance
        route = chance.choice([*(path for _, path in self._routes), "/v1/realtime", "/v1/realtime"])
        headers = [
            (b"Upgrade", chance.choice(odd.UPGRADES)),
            (b"Connection", b"Upgrade"),
            (b"Sec-WebSocket-Key", chance.choice(odd.UPGRADE_KEYS)),
            (b"Sec-WebSocket-Version", chance.choice((b"13", b"8", b"x"))),
        ]
        asks_other = chance.random() < 0.2
        if asks_other:
            headers.append((b"X-Expo-Alpha", chance.choice(odd.OTHER_ALPHAS)))
        has_key = chance.random() < 0.4
        head = self._head(b"GET", route.encode(), headers, has_key=has_key)
        return Message("upgrade", (head, chance.choice(odd.FRAMES)), has_key, asks_other, "GET")

    def garbage(self) -> Message:
        """Bytes that are no request any more, or never were one."""
        chance = self._chance
        if chance.random() < 0.2:
            return Message("garbage", (chance.randbytes(chance.choice((1, 16, 4096, 70_000))),))
        method, route = chance.choice(self._routes)
        head = self._head(method.encode(), route.encode(), [(b"Content-Length", b"2")])
        return Message("garbage", (change_bytes(head + b"{}", chance),))

    def _whole(
        self, kind: str, method: bytes, path: bytes, headers: Sequence[Header] = (), body: bytes = b"", *, has_key: bool
    ) -> Message:
        """Return one request that the server can answer; it closes the connection, so that the end can be told."""
        length = [(b"Content-Length", b"%d" % len(body))] if body else []
        head = self._head(method, path, [*headers, *length, (b"Connection", b"close")], has_key=has_key)
        return Message(kind, (head + body,), has_key, method=method.decode(), is_whole=True)

    def _head(self, method: bytes, path: bytes, headers: Sequence[Header] = (), *, has_key: bool = False) -> bytes:
        own = [(b"Host", b"127.0.0.1")] if not any(name == b"Host" for name, _ in headers) else []
        own += [(b"Authorization", self._authorization)] if has_key else []
        lines = [name + b": " + value for name, value in (*own, *headers)]
        return method + b" " + path + b" HTTP/1.1\r\n" + b"\r\n".join(lines) + b"\r\n\r\n"
