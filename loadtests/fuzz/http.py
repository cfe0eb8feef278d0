"""Sends hostile bytes to a running server and checks what comes back.

python -m loadtests.fuzz.http --minutes 60 --seed 1

A real server with an API key gets, over raw sockets, odd headers, paths, methods, bodies, chunks, pipelines, smuggled
requests and upgrades. Without the key only the open routes may answer anything but 401; every answer of the application
has X-Expo-Alpha; a request for another alpha is never answered; there is no status of 500 or above that plain
vLLM does not give too (in the end it is asked); the server lives on, answers the same greedy request alike, and does
not grow. What breaks this is kept in the work folder, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import re
import secrets
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from loadtests.fuzz.answers import Answer, parse, problems
from loadtests.fuzz.http_values import BODIES, MODEL
from loadtests.fuzz.messages import Drawer, Message
from loadtests.fuzz.sockets import exchange
from loadtests.results import RESULTS, WORK, save
from loadtests.servers import ended
from tests.server import Server

ALPHA = "0.5"
MOST_GROWTH_BYTES = 512 * 2**20
CLIENTS = 6
_CHECK_SECONDS = 60.0
_WHOLE_SECONDS = (120.0, 60.0)
_UNFINISHED_SECONDS = (1.0, 0.2)
"""How long to wait for the first byte, and how long for each after it."""
_MOST_FINDS = 200
_LEFT_OUT = frozenset({"/scale_elastic_ep"})
"""With the key it does what it says: it makes the server restart its engines."""
_TRACEBACK_LINE = re.compile(r"  +|[\w.]+(Error|Exception|Exit|Interrupt|Warning)\b")
_FOLDERS = re.compile(r'"[^"]*/(site-packages/|lib/python[\d.]+/|(?=expo_serve/))')
_SHOWN_LINES = 4
_FLAGS = ["--served-model-name", MODEL, "--enforce-eager", "--max-model-len", "512"]
_GREEDY = {**BODIES["/v1/completions"], "max_tokens": 16}


@dataclass
class Tally:
    """What has happened so far; the clients share it."""

    messages: Counter[str] = field(default_factory=Counter)
    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    finds: dict[str, dict[str, Any]] = field(default_factory=dict)
    resident: list[int] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, message: Message, answers: list[Answer]) -> None:
        """Count a message and its answers."""
        with self.lock:
            self.messages[message.kind] += 1
            counted = self.statuses.setdefault(message.kind, Counter())
            counted.update([str(answer.status) for answer in answers] or ["none"])


class Fuzzer:
    """Sends messages to one server.

    Args:
        server: it runs, with a key and the model's name of the messages.
        seed: of the messages.
        folder: where those that break a promise are kept.
    """

    def __init__(self, server: Server, seed: int, folder: Path) -> None:
        self._server, self._seed, self._folder = server, seed, folder
        self.tally = Tally()
        self._stop = threading.Event()
        self._routes = routes(server)
        self._expected = self._greedy()
        self._alone = threading.Lock()

    def run(self, minutes: float) -> None:
        """Send messages until the time is over, or the server has ended."""
        clients = [threading.Thread(target=self._client, args=(number,), daemon=True) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        end = time.monotonic() + minutes * 60
        while time.monotonic() < end and not self._stop.is_set():
            self._check()
            self._stop.wait(min(_CHECK_SECONDS, max(0.0, end - time.monotonic())))
        self._stop.set()
        for client in clients:
            client.join(_WHOLE_SECONDS[0])
        self._check()

    def _client(self, number: int) -> None:
        drawer = Drawer(self._routes, str(self._server.api_key), random.Random(f"{self._seed}-{number}"))
        while not self._stop.is_set():
            message = drawer.draw()
            try:
                answers = send(self._server.port, message)
            except OSError as error:
                self._keep(f"{type(error).__name__}: no connection", message, str(error))
                time.sleep(1)
                continue
            self.tally.add(message, answers)
            for problem in problems(message, answers, str(self._server.api_key), ALPHA):
                self._again(problem, message)

    def _again(self, problem: str, message: Message) -> None:
        """Keep a find, with what the server's log says when it is sent once more."""
        if not problem.startswith("status 5"):
            self._keep(problem, message, "")
            return
        with self._alone:
            before = len(self._server.text())
            with contextlib.suppress(OSError):
                send(self._server.port, message)
            time.sleep(0.5)
            trace = _traceback(self._server.text()[before:])
        target = message.raw.split(b" ")[1:2]
        self._keep(f"{problem}: {trace[-1] if trace else target}", message, "\n".join(trace[-_SHOWN_LINES:]))

    def _keep(self, problem: str, message: Message, log: str) -> None:
        place = f"{message.kind}: {problem[:200]}"
        with self.tally.lock:
            if place in self.tally.finds or len(self.tally.finds) >= _MOST_FINDS:
                return
            name = hashlib.sha256(place.encode()).hexdigest()[:10]
            (self._folder / f"{name}.json").write_text(json.dumps(as_json(message)))
            head = message.raw[:200].replace(str(self._server.api_key).encode(), b"KEY")
            self.tally.finds[place] = {"file": f"{name}.json", "log": log, "head": repr(head)}
        print(place, flush=True)

    def _greedy(self) -> str:
        with httpx.Client(timeout=_WHOLE_SECONDS[0]) as client:
            headers = {"Authorization": f"Bearer {self._server.api_key}"}
            answer = client.post(f"{self._server.url}/v1/completions", json=_GREEDY, headers=headers).raise_for_status()
        return str(answer.json()["choices"][0]["text"])

    def _check(self) -> None:
        """See that the server lives, answers as before, and note its size."""
        nobody = Message("check", (), has_key=True)
        if self._server.process.poll() is not None:
            self._keep(f"the server ended with {self._server.process.returncode}", nobody, self._server.tail())
            self._stop.set()
            return
        try:
            if (text := self._greedy()) != self._expected:
                self._keep("another answer than before", nobody, f"{self._expected!r} {text!r}")
        except httpx.HTTPError as error:
            self._keep(f"no greedy answer: {type(error).__name__}", nobody, str(error))
        self.tally.resident.append(sum(process.memory_info().rss for process in self._server.family()))

    def figures(self, minutes: float) -> dict[str, Any]:
        """Return what is kept as the result."""
        tally = self.tally
        with tally.lock:
            return {
                "seed": self._seed,
                "minutes": round(minutes, 2),
                "messages": {"total": sum(tally.messages.values()), **dict(sorted(tally.messages.items()))},
                "statuses": {kind: dict(sorted(one.items())) for kind, one in sorted(tally.statuses.items())},
                "resident_bytes": {
                    "first": tally.resident[0],
                    "last": tally.resident[-1],
                    "largest": max(tally.resident),
                },
                "greedy_checks": len(tally.resident),
                "finds": dict(tally.finds),
            }


def send(port: int, message: Message) -> list[Answer]:
    """Send a message and return the answers."""
    first, quiet = _WHOLE_SECONDS if message.is_whole else _UNFINISHED_SECONDS
    return parse(exchange(port, message.parts, first_seconds=first, quiet_seconds=quiet), message.method)


def as_json(message: Message) -> dict[str, Any]:
    """Return a message for a JSON file."""
    fields = {name: getattr(message, name) for name in ("kind", "has_key", "asks_other_alpha", "method", "is_whole")}
    return {**fields, "parts": [part.decode("latin-1") for part in message.parts]}


def from_json(found: dict[str, Any]) -> Message:
    """Return a message from a JSON file."""
    return Message(**{**found, "parts": tuple(part.encode("latin-1") for part in found["parts"])})


def routes(server: Server) -> list[tuple[str, str]]:
    """Return methods and paths of the server, by its own description, and those that it does not describe."""
    described = server.get("/openapi.json").json()["paths"]
    found = [
        (method.upper(), path) for path, methods in described.items() for method in methods if path not in _LEFT_OUT
    ]
    found = [(method, path.replace("{response_id}", "resp_1")) for method, path in found]
    return [*found, *(("GET", path) for path in ("/metrics", "/docs", "/openapi.json", "/redoc", "/v1/no-such-route"))]


def _traceback(log: str) -> list[str]:
    """Return the last traceback, its frames and the exception; other lines of the log may stand among them."""
    lines = log.rpartition("Traceback (most recent call last)")[2].splitlines() if "Traceback" in log else []
    found = [_FOLDERS.sub('"', line) for line in lines if _TRACEBACK_LINE.match(line)]
    ends = [number for number, line in enumerate(found) if not line.startswith(" ")]
    return found[: ends[0] + 1] if ends else found


def by_plain_vllm(finds: dict[str, dict[str, Any]], key: str, work: Path) -> None:
    """Send what was answered with a status of 500 or above to plain vLLM, and note its status beside it."""
    faults = [find for place, find in finds.items() if "status 5" in place]
    if not faults:
        return
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    server = Server(["--model", ".demo/aligned", *_FLAGS], work / "plain.log", command=command, VLLM_API_KEY=key)
    with ended(server):
        server.wait_ready()
        for find in faults:
            message = from_json(json.loads((work / find["file"]).read_text()))
            with contextlib.suppress(OSError):
                find["statuses_of_plain_vllm"] = [answer.status for answer in send(server.port, message)]


def is_of_vllm(find: dict[str, Any]) -> bool:
    """Return whether plain vLLM answers the same with a status of 500 or above."""
    return any(status >= 500 for status in find.get("statuses_of_plain_vllm", ()))


def start(work: Path, key: str) -> Server:
    """Start the server on the demo's pair."""
    deployment = ["--base", ".demo/base", "--aligned", ".demo/aligned", "--alpha", ALPHA]
    server = Server([*deployment, *_FLAGS], work / "server.log", VLLM_API_KEY=key)
    server.api_key = key
    return server


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="default 60")
    parser.add_argument("--seed", type=int, default=1, help="default 1")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the log and for what broke a promise")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    work = options.work / "fuzz_http"
    work.mkdir(parents=True, exist_ok=True)
    key = secrets.token_urlsafe(24)
    with ended(start(work, key)) as server:
        server.wait_ready()
        fuzzer = Fuzzer(server, options.seed, work)
        began = time.monotonic()
        fuzzer.run(options.minutes)
        figures = fuzzer.figures((time.monotonic() - began) / 60)
    save("fuzz_http", f"seed {options.seed}", figures, options.results)
    by_plain_vllm(figures["finds"], key, work)
    save("fuzz_http", f"seed {options.seed}", figures, options.results)
    grown = figures["resident_bytes"]["largest"] - figures["resident_bytes"]["first"] > MOST_GROWTH_BYTES
    print(json.dumps(figures, indent=1))
    sys.exit(1 if grown or not all(map(is_of_vllm, figures["finds"].values())) else 0)


if __name__ == "__main__":
    main()
