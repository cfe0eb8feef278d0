"""A judge behind a real HTTP server, which can misbehave in the ways that real ones do."""

from __future__ import annotations

import json
import math
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

_ANSWERS = re.compile(
    r"\[Answer A\]\n(.*?)\n\[End of answer A\]\n\n\[Answer B\]\n(.*?)\n\[End of answer B\]", re.DOTALL
)

Judgement = Callable[[str, str], float]
"""Probability that the first of two answers is the better one."""
Fault = Callable[[int], str | None]
"""What goes wrong with a request, by its number: a status, ``reset``, ``garbage``, ``hang``, or nothing."""


def longer(first: str, second: str) -> float:
    """Prefer the longer answer, and the first place."""
    return 1 / (1 + math.exp(len(second) - len(first) - 0.5))


def with_logprobs(probability: float) -> dict[str, Any]:
    """A choice of a server that gives log-probabilities; the letters come in two spellings."""
    tops = [("A", 0.6 * probability), (" A", 0.2 * probability), ("B", 0.8 * (1 - probability)), ("The", 0.2)]
    listed = [{"token": token, "logprob": math.log(max(mass, 1e-12))} for token, mass in tops]
    text = "A" if probability >= 0.5 else "B"
    first = {"token": text, "logprob": -0.1, "top_logprobs": listed}
    return {
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
        "logprobs": {"content": [first]},
    }


def with_text(text: str, finish_reason: str = "stop") -> dict[str, Any]:
    """A choice of a server that gives text only."""
    return {"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}


class JudgeServer:
    """A judge on a free port of the loopback interface.

    Args:
        judgement: how it judges.
        choose: makes the reply's choice of a judgement and the request.
        fault: what goes wrong.
        check: looks at a request's body, and returns a status and a message to refuse it with.
    """

    def __init__(
        self,
        judgement: Judgement = longer,
        choose: Callable[[float, dict[str, Any]], dict[str, Any]] = lambda probability, _: with_logprobs(probability),
        fault: Fault = lambda _: None,
        check: Callable[[dict[str, Any], str], tuple[int, str] | None] = lambda _, __: None,
    ) -> None:
        self.judgement, self.choose, self.fault, self.check = judgement, choose, fault, check
        self.bodies: list[dict[str, Any]] = []
        """Of all requests, in their order."""
        self.keys: set[str] = set()
        self.answered: list[str] = []
        """Questions that a whole reply was sent to."""
        self._lock = threading.Lock()

    def __enter__(self) -> JudgeServer:
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.answer(self, body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """With /v1."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def spec(self) -> str:
        """What ``--reward`` gets."""
        return f"openai:{self.url},judge"

    def answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        """Reply to a request, or misbehave."""
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.keys.add(handler.headers.get("Authorization", ""))
        if handler.path != "/v1/chat/completions":
            return _send(handler, 404, {"error": {"message": "Not Found"}})
        if refused := self.check(body, handler.headers.get("Authorization", "")):
            return _send(handler, refused[0], {"error": {"message": refused[1], "param": None}})
        match self.fault(number):
            case None:
                question = body["messages"][-1]["content"]
                found = _ANSWERS.search(question)
                assert found
                choice = self.choose(self.judgement(found[1], found[2]), body)
                _send(handler, 200, {"id": "1", "object": "chat.completion", "choices": [{"index": 0, **choice}]})
                with self._lock:
                    self.answered.append(question)
            case "reset":
                handler.close_connection = True
                handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            case "garbage":
                _send(handler, 200, "<html>Bad gateway</html>")
            case "hang":
                time.sleep(2)
                handler.close_connection = True
            case status:
                assert status is not None
                _send(handler, int(status), {"error": {"message": "overloaded"}})


def _send(handler: BaseHTTPRequestHandler, status: int, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(text.encode())))
    if status in (429, 500, 503):
        handler.send_header("Retry-After-Ms", "1")
    handler.end_headers()
    handler.wfile.write(text.encode())
