"""A real server that faults are done to: its processes by their roles, its state, its answers, and what it leaves."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import time
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

from loadtests.chaos.faults import ENGINE_TIMEOUT, Port
from loadtests.chaos.surroundings import SHARED_MEMORY, Place
from tests.server import ENGINE_ENV, EXPO_SERVE, Server, free_port

MODEL = "chaos"
_FLAGS = ["--max-model-len", "1024", "--enforce-eager", "--served-model-name", MODEL]
_MARK = "EXPO_CHAOS_SERVER"
_ASK_SECONDS = 2.0
_LOOK_SECONDS = 5.0
"""As the chart's readiness probe waits (``probes.readiness.timeoutSeconds``)."""
_ANSWER_TOKENS = 24
_QUESTIONS = Path(__file__).parents[2] / "deploy/demo/questions.jsonl"
_NUM_QUESTIONS = 6
# What the command lines of the processes have in them.
_ROLES = {
    "expo_serve.cli.keeper": "keeper",
    "expo_serve.state.server": "status",
    "expo_serve.vllm_plugin.server": "api",
    "VLLM::EngineCore": "engine",
    "VLLM::Worker": "worker",
    "multiprocessing.resource_tracker": "resource tracker",
}
_NOT_THE_SERVERS = ("ballast", "faketime_shm", "sem.faketime_sem")
"""Shared memory of the faults: what fills it, and what libfaketime makes in the processes that it is loaded into."""
# A harness in the background of a shell ignores some, and its children would inherit that.
_DEFAULT_SIGNALS = ["env", "--default-signal=HUP,INT,QUIT,TERM"]


class Look(NamedTuple):
    """One answer to the question whether requests should be sent.

    Args:
        at: CLOCK_MONOTONIC in seconds when it was asked for.
        code: the status code; None where none came.
        seconds: how long it took.
        error: why none came: what kind of error of the client.
    """

    at: float
    code: int | None
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class Remains:
    """What a server has left behind after its end."""

    processes: tuple[str, ...]
    segments: tuple[str, ...]
    sockets: tuple[str, ...]
    files: tuple[str, ...]
    """Other files in TMPDIR; caches are not among them."""

    def __bool__(self) -> bool:
        return bool(self.processes or self.segments or self.sockets)


class Victim(Server):
    """The real command in its surroundings.

    Args:
        place: where it runs.
        number: of the server, for the mark in its environment by which its processes are found.
        more: further flags.
    """

    def __init__(self, place: Place, number: int, *more: str) -> None:
        self.place, self.log, self.api_key = place, place.log, None
        self.port, self.status_port = free_port(), free_port()
        self._mark = f"{os.getpid()} {number}"
        self._segments: set[str] = set()
        self._known: dict[tuple[int, float], tuple[psutil.Process, str]] = {}
        self._more = more

    def start(self) -> None:
        """Start the command."""
        self._segments = _segments()
        place = self.place
        flags = ["--base", str(place.base), "--aligned", str(place.aligned), "--alpha", "0.5", *_FLAGS]
        flags += ["--host", place.host, "--port", str(self.port), "--status-port", str(self.status_port)]
        flags += ["--engine-timeout", f"{ENGINE_TIMEOUT:g}", *self._more]
        with ExitStack() as stack:
            output = place.pipe.writer if place.pipe else stack.enter_context(self.log.open("wb"))
            self.process = subprocess.Popen(
                [*_DEFAULT_SIGNALS, *place.prefix, *EXPO_SERVE, *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**ENGINE_ENV, **place.environment, _MARK: self._mark},
            )

    @property
    def url(self) -> str:
        """The server's root."""
        return f"http://{self.place.host}:{self.port}"

    @property
    def status_url(self) -> str:
        """The root of the status port."""
        return f"http://{self.place.host}:{self.status_port}"

    def is_alive(self) -> bool:
        """Return whether the command runs."""
        return self.process.poll() is None

    def roles(self) -> dict[str, psutil.Process]:
        """Return the processes that live, by role; the others are called by their command lines."""
        found = {}
        for process in self.living():
            with suppress(psutil.Error):
                found[role_of(process, self.process.pid)] = process
        return found

    def living(self) -> list[psutil.Process]:
        """Return all processes of this server that live: its family, and whoever inherited its environment."""
        with suppress(psutil.Error):
            self._remember(self.family())
        self._remember(process for process in psutil.process_iter() if self._is_marked(process))
        return [process for process, _ in self._known.values() if _lives(process)]

    def _remember(self, processes: Any) -> None:
        for process in processes:
            with suppress(psutil.Error):
                self._known[process.pid, process.create_time()] = (process, " ".join(process.cmdline()))

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(_MARK) == self._mark
        except (psutil.Error, OSError):
            return False

    def state(self) -> dict[str, Any]:
        """Return what the status port shows; empty where it does not answer."""
        try:
            state: dict[str, Any] = httpx.get(f"{self.status_url}/state", timeout=_ASK_SECONDS).json()
        except (httpx.HTTPError, ValueError):
            return {}
        return state

    def health(self) -> int | None:
        """Return the status code of ``/health``; None where it does not answer."""
        return self.look("health").code

    def ready(self) -> int | None:
        """Return the status code of ``/ready`` on the status port; None where it does not answer."""
        return self.look("ready").code

    def look(self, port: Port) -> Look:
        """Ask one of both ports, as a kubelet does."""
        return _ask(f"{self.url}/health" if port == "health" else f"{self.status_url}/ready", _LOOK_SECONDS)

    def scrape(self) -> int | None:
        """Read the metrics of the status port, as a monitoring system does; None where they are not there."""
        return _ask(f"{self.status_url}/metrics").code

    def answers(self) -> list[str]:
        """Return the greedy answers to some questions, one request at a time."""
        return [self._answer(question) for question in _questions()]

    def _answer(self, question: str, tokens: int = _ANSWER_TOKENS) -> str:
        messages = [{"role": "user", "content": question}]
        body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": tokens}
        body["cache_salt"] = (
            uuid.uuid4().hex
        )  # no prefix comes from the cache: what is computed with it rounds otherwise
        answer = self.post("/v1/chat/completions", body).raise_for_status().json()
        return str(answer["choices"][0]["message"]["content"])

    def serves(self) -> bool:
        """Return whether it says that it is ready, and answers something new."""
        if self.health() != 200 or self.ready() != 200:
            return False
        body = {"model": MODEL, "prompt": f"{time.time()}", "max_tokens": 2}
        try:
            return httpx.post(f"{self.url}/v1/completions", json=body, timeout=10).status_code == 200
        except httpx.HTTPError:
            return False

    def last_line(self) -> str:
        """Return the last line of the log that is not empty."""
        return next((line for line in reversed(self.text().splitlines()) if line.strip()), "")

    def remains(self, within: float = 3.0) -> Remains:
        """Return what is left some seconds after the end; caches are no remains."""
        deadline = time.monotonic() + within
        while (remains := self._remains()) and time.monotonic() < deadline:
            time.sleep(0.3)
        return remains

    def _remains(self) -> Remains:
        files = [file for file in self.place.temporary.rglob("*") if not file.is_dir()]
        kept = [file for file in files if not any("torchinductor" in part for part in file.parts)]
        sockets = {file for file in kept if stat.S_ISSOCK(file.lstat().st_mode)}
        return Remains(
            tuple(f"{process.pid} {self._line_of(process)}" for process in self.living()),
            tuple(sorted(_segments() - self._segments)),
            tuple(sorted(file.name for file in sockets)),
            tuple(sorted(str(file.relative_to(self.place.temporary)) for file in kept if file not in sockets)),
        )

    def _line_of(self, process: psutil.Process) -> str:
        return self._known[process.pid, process.create_time()][1][:100]

    def kill_all(self) -> None:
        """Leave nothing, whatever has happened."""
        for process in self.living():
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()


def role_of(process: psutil.Process, command: int) -> str:
    """Return what a process is in a server; one without a role is called by its command line.

    Args:
        process: of the server.
        command: the process id of the server's first process.
    """
    if process.pid == command:
        return "command"
    line = " ".join(process.cmdline())
    return next((role for text, role in _ROLES.items() if text in line), line)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _segments() -> set[str]:
    return {file.name for file in SHARED_MEMORY.iterdir() if not file.name.startswith(_NOT_THE_SERVERS)}


def _ask(url: str, seconds: float = _ASK_SECONDS) -> Look:
    at, code, error = time.monotonic(), None, ""
    try:
        code = httpx.get(url, timeout=seconds, verify=False).status_code  # no certificates are loaded
    except httpx.HTTPError as raised:
        error = type(raised).__name__
    return Look(at, code, time.monotonic() - at, error)


def _questions() -> list[str]:
    lines = _QUESTIONS.read_text().splitlines()[:_NUM_QUESTIONS]
    return [json.loads(line)["prompt"] for line in lines]
