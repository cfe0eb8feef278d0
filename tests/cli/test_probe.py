"""``expo-serve probe``: what a readiness probe and ``helm test`` ask."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.command import refused
from tests.conftest import ALPHA, API_KEY
from tests.server import Server, free_port, run_command

REPORT = {"alpha": -0.5, "served_model_names": ["first", "second"]}


@contextmanager
def answering(body: bytes, status: int = 200) -> Iterator[str]:
    """The URL of something that gives this answer to every GET: servers that are wrong, or none of ours."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("alpha", ["-0.5", "-0.50", "-5e-1"])
@pytest.mark.parametrize("name", [[], ["--served-model-name", "first"], ["--served-model-name", "second"]])
def test_same_number_and_any_served_name_pass(alpha: str, name: list[str]) -> None:
    with answering(json.dumps(REPORT).encode()) as url:
        result = run_command("probe", "--url", url, f"--alpha={alpha}", *name)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(f"serves alpha {alpha}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--alpha", "0.5"], ("serves alpha -0.5", "expected 0.5")),
        (["--alpha", "-0.5", "--served-model-name", "third"], ("first, second", "expected third")),
    ],
)
def test_another_alpha_or_name_fails(arguments: list[str], words: tuple[str, ...]) -> None:
    with answering(json.dumps(REPORT).encode()) as url:
        refused("probe", "--url", url, *arguments, words=words, code=1)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{}", 200, ("not from expo-serve",)),
        (b"[]", 200, ("not from expo-serve",)),
        (b"<html>", 200, ("does not answer",)),
        (b"{}", 404, ("answered 404",)),
        (b"{}", 401, ("answered 401", "VLLM_API_KEY")),
    ],
)
def test_other_servers_fail(body: bytes, status: int, words: tuple[str, ...]) -> None:
    with answering(body, status) as url:
        refused("probe", "--url", url, "--alpha", "1", words=words, code=1)


def test_nobody_there_fails() -> None:
    refused("probe", "--url", f"http://127.0.0.1:{free_port()}", "--alpha", "1", words=("does not answer",), code=1)


def test_proxy_of_the_environment_is_not_asked() -> None:
    with answering(json.dumps(REPORT).encode()) as url:
        nobody = f"http://127.0.0.1:{free_port()}"
        assert run_command("probe", "--url", url, "--alpha=-0.5", http_proxy=nobody).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("--alpha",)),
        (["--alpha", "x"], ("--alpha", "'x'")),
        (["--alpha", "1", "--url", "localhost:8000"], ("--url", "http://HOST:PORT")),
        (["--alpha", "1", "--timeout", "soon"], ("--timeout",)),
        (["--alpha", "1", "--alp", "2"], ("--alp",)),
    ],
)
def test_wrong_call(arguments: list[str], words: tuple[str, ...]) -> None:
    refused("probe", *arguments, words=words)


@pytest.mark.engine
def test_real_server_with_its_key_answers(server: Server) -> None:
    common = ("probe", "--url", server.url, "--alpha", ALPHA, "--served-model-name", "first")
    result = run_command(*common, "--completion", VLLM_API_KEY=API_KEY)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    refused(*common, words=("401", "VLLM_API_KEY"), code=1)
    refused("probe", "--url", server.url, "--alpha", "0.25", words=("serves alpha 0.5",), code=1, VLLM_API_KEY=API_KEY)
