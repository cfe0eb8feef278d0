"""An address that vLLM could not serve at is refused in one line, which names who has it. All sockets are real."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from expo_serve.errors import AddressError, ExpoError, UsageError
from expo_serve.vllm_plugin import address
from expo_serve.vllm_plugin.address import refuse_taken
from tests.server import free_port
from tests.vllm_plugin.addresses import as_nobody, refusal


def need(*hosts: str | None) -> None:
    """Skip a test where the machine has no IPv6."""
    for host in hosts:
        if host and ":" in host:
            try:
                socket.create_server(("::1", 0), family=socket.AF_INET6).close()
            except OSError as error:
                pytest.skip(f"no IPv6 here: {error}")


@contextmanager
def bound(host: str = "127.0.0.1", port: int = 0, backlog: int | None = 5) -> Iterator[int]:
    """A port that is taken as vLLM does; with no backlog nobody listens on it yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        if backlog is not None:
            listener.listen(backlog)
        yield listener.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", None, "", "0.0.0.0", "::1", "::"])
def test_free_port_is_left_free(host: str | None) -> None:
    need(host)
    with bound() as port:
        pass
    refuse_taken(host, port, None)
    refuse_taken(host, port, None)
    with bound("127.0.0.1", port):
        pass


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "localhost"), ("127.0.0.1", None), ("0.0.0.0", "127.0.0.1"),
     ("0.0.0.0", ""), ("::", "127.0.0.1"), ("::", None), ("::1", "::1"), ("127.0.0.1", "::")],
)  # fmt: skip
def test_port_that_is_taken_names_who_has_it(theirs: str, ours: str | None) -> None:
    need(theirs, ours)
    with bound(theirs) as port:
        line = refusal(ours, port)
    where = ours or "all interfaces"
    assert line.startswith(f"--port: port {port} of {where} is taken by process {os.getpid()} (")
    assert line.endswith("); end it, or choose another port")


def test_another_address_of_the_same_port_is_free() -> None:
    with bound("127.0.0.1") as port:
        refuse_taken("127.0.0.2", port, None)


def test_module_that_has_the_port_is_named() -> None:
    command = [sys.executable, "-um", "http.server", "--bind", "127.0.0.1", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        port = int(child.stdout.readline().split(" port ")[1].split()[0])
        line = refusal("127.0.0.1", port)
        child.kill()
    assert f"process {child.pid} (python" in line


def test_port_of_who_started_us_is_the_status_port() -> None:
    code = (
        "import sys; from expo_serve.vllm_plugin.address import refuse_taken; refuse_taken('', int(sys.argv[1]), None)"
    )
    with bound() as port:
        command = [sys.executable, "-c", code, str(port)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert f"--port: {port} is taken by process {os.getpid()} (" in result.stderr
    assert result.stderr.endswith("), which started vLLM: as --status-port? Choose another port\n")


def test_server_that_does_not_listen_yet_is_noticed() -> None:
    """vLLM itself would load, and fail when it begins to listen."""
    with bound(backlog=None) as port:
        with bound("127.0.0.1", port, backlog=None):
            pass
        line = refusal("127.0.0.1", port)
    assert "is taken by another server that does not listen yet" in line


def test_connections_that_linger_do_not_matter() -> None:
    """A server that is started again at once: its last connections are still there, as TIME_WAIT."""
    with bound() as port:
        pass
    with socket.create_server(("127.0.0.1", port)) as listener:
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = listener.accept()
        accepted.close()
        client.close()
    assert address._uses_of(port), "nothing lingers: this shows nothing"
    refuse_taken("127.0.0.1", port, None)


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("192.0.2.1", "--host: 192.0.2.1 is no address of this machine"),
        ("2001:db8::1", "--host: 2001:db8::1 is no address of this machine"),
        ("no-such-name.invalid", "--host: no-such-name.invalid is neither an address nor the name of an IPv4 one ("),
        ("999.1.1.1", "--host: 999.1.1.1 is neither an address nor the name of an IPv4 one ("),
        ("[::1]", "; write an IPv6 address without brackets"),
        ("ü" * 70, "is neither an address nor the name of an IPv4 one ("),
        ("a\0b\n", r"--host: 'a\x00b\n' is neither an address nor"),
    ],
)
def test_host_that_is_none_of_ours(host: str, words: str) -> None:
    need(host if host.startswith("2001") else None)
    assert words in refusal(host, free_port())


@pytest.mark.parametrize("port", [-1, 0, 65536, 70000])
def test_port_that_does_not_exist(port: int) -> None:
    with pytest.raises(UsageError, match=f"^--port: expected a port from 1 to 65535, found {port}$"):
        refuse_taken("127.0.0.1", port, None)


def test_privileged_port() -> None:
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 80:
        pytest.skip("every port is for everybody here")
    result = as_nobody("refuse_taken('127.0.0.1', 80, None)")
    assert "--port: port 80 needs a right that this process does not have; choose one from 1024" in result.stderr


def test_owner_that_cannot_be_seen() -> None:
    with bound() as port:
        result = as_nobody("refuse_taken('127.0.0.1', int(sys.argv[1]), None)", str(port))
    assert (
        "is taken by a process that cannot be seen from here (another user's or another container's);" in result.stderr
    )


def test_error_is_shown_as_one_of_an_address() -> None:
    assert issubclass(AddressError, ExpoError)
    assert (AddressError.reason, AddressError.exit_code) == ("address", 1)


def test_it_is_quick() -> None:
    """So that it costs a start nothing."""
    began, port = time.monotonic(), free_port()
    for _ in range(10):
        refuse_taken("127.0.0.1", port, None)
    assert time.monotonic() - began < 1


@pytest.mark.locked
@pytest.mark.parametrize("is_headless", [True, False])
def test_server_that_opens_no_port_is_not_asked_for_one(monkeypatch: pytest.MonkeyPatch, is_headless: bool) -> None:
    from expo_serve.vllm_plugin import compat, loader, server  # which import vLLM

    asked: list[int] = []
    command = SimpleNamespace(validate=lambda _: None, cmd=lambda _: None)
    args = Namespace(headless=is_headless, host=None, port=8000, uds=None, enable_elastic_ep=False)
    for place, name in (
        (compat, "version_warning"), (compat, "cli_env_setup"), (loader, "register_loader"),
        (compat, "configure_logging_from_args"), (server, "_use_eager_without_compiler"),
        (server, "_write_status"),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, lambda *_: None)
    monkeypatch.setattr(server, "parse", lambda _: (command, args))
    monkeypatch.setattr(server, "refuse_taken", lambda host, port, uds: asked.append(port))
    server.serve({"status_fd": 0})
    assert asked == ([] if is_headless else [8000])
