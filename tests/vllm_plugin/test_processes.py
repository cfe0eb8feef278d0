"""The command answers for its whole tree of processes, however it ends. Tiny models: the load is not the point."""

from __future__ import annotations

import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.server import Server
from tests.vllm_plugin.trees import LIMIT_SECONDS, assert_all_gone, assert_nothing_new, last_line, shared_memory

pytestmark = pytest.mark.engine
LOADING = "Starting to load model"
LOADED = "expo: loaded with alpha"

Start = Callable[..., Server]


@pytest.fixture
def start(tiny_pair: tuple[Path, Path], tmp_path: Path) -> Iterator[Start]:
    """Start the real command on the tiny pair; whatever is left in the end is a failure, and killed."""
    segments = shared_memory()
    servers: list[Server] = []

    def start_server(base: Path | str | None = None, **environment: str) -> Server:
        arguments = ["--base", str(base or tiny_pair[0]), "--aligned", str(tiny_pair[1]), "--alpha", "0.5"]
        arguments += ["--enforce-eager", "--max-model-len", "64"]
        servers.append(Server(arguments, tmp_path / "log", **environment))  # type: ignore[arg-type]
        return servers[-1]

    try:
        yield start_server
    finally:
        for server in servers:
            server.process.kill()
            server.process.wait()
    assert_nothing_new(segments)


def end_and_time(server: Server, number: int) -> tuple[int, float]:
    family = server.family()
    started = time.monotonic()
    code = server.stop(number)
    assert_all_gone(family)
    return code, time.monotonic() - started


@pytest.fixture
def silent_hub() -> Iterator[socket.socket]:
    """Something that listens like a hub and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        yield listener


def test_sigterm_while_resolving(start: Start, silent_hub: socket.socket) -> None:
    """It asks the hub for base just now, and would for a long time."""
    port = silent_hub.getsockname()[1]
    server = start(base="someone/model", HF_HUB_OFFLINE="0", HF_ENDPOINT=f"http://127.0.0.1:{port}")
    connection, _ = silent_hub.accept()
    with connection:
        code, seconds = end_and_time(server, signal.SIGTERM)
    assert code == 143
    assert seconds < LIMIT_SECONDS


@pytest.mark.slow
def test_second_signal_ends_at_once(start: Start) -> None:
    """Ctrl-C, then SIGTERM: two different signals, which the kernel never makes one, in the order of their numbers."""
    server = start()
    server.wait_for_line("vLLM")
    family = server.family()
    server.process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert server.stop(signal.SIGTERM) == 143
    assert time.monotonic() - started < 3
    assert_all_gone(family)


@pytest.mark.slow
def test_interrupt_while_loading(start: Start) -> None:
    server = start()
    server.wait_for_line(LOADING)
    code, seconds = end_and_time(server, signal.SIGINT)
    assert code == 130
    assert seconds < LIMIT_SECONDS


@pytest.mark.slow
def test_sigterm_while_warming_up(start: Start) -> None:
    server = start()
    server.wait_for_line(LOADED)
    code, seconds = end_and_time(server, signal.SIGTERM)
    assert code == 143
    assert seconds < LIMIT_SECONDS


def test_a_load_that_fails_names_the_cause_last(start: Start, tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_pair[0], damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.inf
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    server = start(base=damaged)
    assert server.process.wait(90) == 1
    line = last_line(server)
    assert line.startswith("expo-serve: error: tensor 'model.norm.weight' in ")
    assert line.endswith("damaged/model.safetensors holds NaN or Inf; the checkpoint is damaged")
