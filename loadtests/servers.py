"""Real servers for the load tests: expo-serve and plain vLLM, started, asked, watched and ended."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from loadtests.pairs import Pair
from loadtests.results import ALPHA
from tests.server import ENGINE_ENV, EXPO_SERVE, Server

MODEL = "bench"
_FLAGS = ["--max-model-len", "512", "--enforce-eager", "--served-model-name", MODEL]
_PLAIN = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
_LOADING = re.compile(r"Loading weights took ([0-9.]+) seconds")
_SAMPLE_SECONDS = 0.1


def expo_server(pair: Pair, log: Path) -> Server:
    """Start expo-serve on a pair."""
    return Server([*_deployment(pair), *_FLAGS], log)


def _deployment(pair: Pair) -> list[str]:
    return ["--base", str(pair.base), "--aligned", str(pair.aligned), "--alpha", str(ALPHA)]


def plain_server(model: Path, log: Path) -> Server:
    """Start plain vLLM on a checkpoint."""
    return Server(["--model", str(model), *_FLAGS], log, command=_PLAIN)


@contextmanager
def ended(server: Server) -> Iterator[Server]:
    """End the server and all of its processes, whatever happens."""
    try:
        yield server
    finally:
        family = server.family() if server.process.poll() is None else []
        with suppress(AssertionError):  # it has not answered SIGTERM, and was killed
            server.stop()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def first_answer(server: Server) -> str:
    """Wait until the server is ready and ask one thing."""
    server.wait_ready()
    body = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    text: str = server.post("/v1/completions", body).raise_for_status().json()["choices"][0]["text"]
    return text


def weights_seconds(server: Server) -> float:
    """How long the weights took: of expo its whole report (find, check, pair, read, combine), else vLLM's own line."""
    answer = server.get("/v1/expo")
    if answer.status_code == 200:
        return float(answer.json()["ranks"][0]["total_seconds"])
    found = _LOADING.search(server.text())
    if found is None:
        raise RuntimeError(f"vLLM did not say how long the weights took:\n{server.tail()}")
    return float(found.group(1))


@dataclass
class PeakMemory:
    """Largest resident size of a process and all its descendants, sampled while the block runs."""

    pid: int
    bytes: int = 0
    _done: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> PeakMemory:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self.bytes = max(self.bytes, _tree_bytes(self.pid))


def _tree_bytes(pid: int) -> int:
    """Pages that two processes share count twice; what is compared is of the same kind on all sides."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for member in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                total += member.memory_info().rss
    return total


def run_watched(command: Sequence[str], log: Path) -> dict[str, Any]:
    """Run a command to its end: seconds and peak resident size.

    Raises:
        RuntimeError: it failed; the end of its output is in the message.
    """
    started = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=ENGINE_ENV)
        try:
            with PeakMemory(process.pid) as peak:
                code = process.wait()
        finally:
            process.kill()
    if code:
        raise RuntimeError(f"{command[0]} ended with {code}:\n{log.read_text(errors='replace')[-4000:]}")
    return {"seconds": time.perf_counter() - started, "peak_resident_bytes": peak.bytes}


def merge_by_us(pair: Pair, out: Path, log: Path) -> Path:
    """Write the extrapolated checkpoint by expo-serve merge, for plain vLLM."""
    run_watched([*EXPO_SERVE, "merge", *_deployment(pair), "--out", str(out)], log)
    return out
