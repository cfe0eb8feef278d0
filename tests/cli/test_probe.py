"""``expo-serve probe``: what a readiness probe and ``helm test`` ask."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.cli.http_servers import REPORT, answering
from tests.command import refused, run_here
from tests.conftest import ALPHA, API_KEY
from tests.server import Server, free_port, run_command


@pytest.mark.parametrize("alpha", ["-0.5", "-0.50", "-5e-1"])
@pytest.mark.parametrize("name", [[], ["--served-model-name", "first"], ["--served-model-name", "second"]])
def test_same_number_and_any_served_name_pass(alpha: str, name: list[str]) -> None:
    with answering(json.dumps(REPORT).encode()) as url:
        result = run_here("probe", "--url", url, f"--alpha={alpha}", *name)
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
        (b"<html>", 200, ("not JSON",)),
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


WRONG_CALLS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no alpha": ([], ("--alpha",)),
    "alpha is no number": (["--alpha", "x"], ("--alpha", "'x'")),
    "alpha is not finite": (["--alpha", "nan"], ("--alpha", "'nan'")),
    "alpha is infinite": (["--alpha", "1e999"], ("--alpha", "'1e999'")),
    "alpha is empty": (["--alpha", ""], ("--alpha", "''")),
    "an abbreviation": (["--alpha", "1", "--alp", "2"], ("--alp",)),
    "empty name": (["--alpha", "1", "--served-model-name", ""], ("--served-model-name", "empty")),
    **{
        f"timeout {text!r}": (["--alpha", "1", f"--timeout={text}"], ("--timeout", "seconds", repr(text)))
        for text in ("soon", "", "0", "-1", "inf", "-inf", "nan", "1e300", "86401", "0.0")
    },
    **{
        f"URL {url!r}": (["--alpha", "1", "--url", url], ("--url", "http://HOST:PORT", repr(url)))
        for url in (
            "",
            "localhost:8000",
            "127.0.0.1",
            "ftp://host:8000",
            "http://",
            "http:host",
            "http://:8000",
            "http://[::1",
            "http://::1:8000",
            "http://host:0",
            "http://host:65536",
            "http://host:-1",
            "http://host:http",
            "http://host:8000?x=1",
            "http://host:8000/#top",
            "http://ho st:8000",
            "http://host:8000/a b",
            "http://host:8000/caf\u00e9",
            "http://host\t:8000",
            "http://host:8000\r\nX-Header: 1",
            "http://a..b:8000",
            f"http://{'a' * 64}:8000",
        )
    },
}


@pytest.mark.parametrize(("arguments", "words"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_call(arguments: list[str], words: tuple[str, ...]) -> None:
    assert len(refused("probe", *arguments, words=words).splitlines()) == 1


@pytest.mark.parametrize("url", ["http://me:secret@host:8000", "http://secret@host", "me:secret@host", "//x:secret@h["])
def test_password_in_the_url_is_refused_and_not_shown(url: str) -> None:
    assert "secret" not in refused("probe", "--url", url, "--alpha", "1", words=("--url",))


@pytest.mark.parametrize("root", ["/", "//", "/prefix", "/prefix/"])
def test_slashes_at_the_end_of_the_url_do_not_matter(root: str) -> None:
    with answering(json.dumps(REPORT).encode()) as url:
        assert run_here("probe", "--url", url + root, "--alpha=-0.5").returncode == 0


def test_server_at_an_ipv6_address_is_asked() -> None:
    refused("probe", "--url", f"http://[::1]:{free_port()}", "--alpha", "1", words=("does not answer",), code=1)


def test_little_is_imported() -> None:
    """It runs every few seconds beside a server that needs the processors."""
    code = "import sys; from expo_serve.cli.main import main; main(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-c", code, "probe", "--url", f"http://127.0.0.1:{free_port()}", "--alpha", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    heavy = {"pydantic", "yaml", "httpx", "asyncio", "urllib.request", "dataclasses", "concurrent.futures", "logging"}
    loaded = set(result.stdout.split())
    assert "http.client" in loaded
    assert not loaded & heavy


@pytest.mark.engine
def test_real_server_with_its_key_answers(server: Server) -> None:
    common = ("probe", "--url", server.url, "--alpha", ALPHA, "--served-model-name", "first")
    result = run_command(*common, "--completion", VLLM_API_KEY=API_KEY)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    refused(*common, words=("401", "VLLM_API_KEY"), code=1)
    refused("probe", "--url", server.url, "--alpha", "0.25", words=("serves alpha 0.5",), code=1, VLLM_API_KEY=API_KEY)
