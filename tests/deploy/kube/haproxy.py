"""A real HAProxy in the place of a gateway: weights, health checks of the status port, no retries unless asked for."""

from __future__ import annotations

import csv
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tests.deploy.kube.podman import bring
from tests.server import free_port

SERVED_BY = "X-Served-By"
"""Header in which the proxy says which of its servers has answered."""
_BACKEND = "variants"
_RETRIES = 3
_CHECK_SECONDS = 1
"""Twice that may pass until the proxy knows that a server is not ready."""


class HAProxy:
    """Runs while the ``with`` block does; every server begins without an address, and with weight 0.

    Args:
        servers: their names.
        ports: of each server: its own, and the status port.
        folder: for its configuration and its log.
        retries: whether a request that is answered with 503, or whose connection fails, is sent to another server.
    """

    def __init__(self, servers: list[str], ports: tuple[int, int], folder: Path, *, retries: bool = False) -> None:
        if not shutil.which("haproxy"):
            bring("haproxy")
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.log = folder / "haproxy.log"
        self._admin = folder / "admin.sock"
        self._config = folder / "haproxy.cfg"
        self._config.write_text(_configuration(servers, ports, self.port, self._admin, retries))

    def __enter__(self) -> HAProxy:
        with self.log.open("wb") as output:
            command = ["haproxy", "-db", "-f", str(self._config)]
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        wait_until(self._answers, 10, self.log.read_text)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(10)

    @property
    def url(self) -> str:
        """What clients ask."""
        return f"http://127.0.0.1:{self.port}"

    def _answers(self) -> bool:
        assert self._process.poll() is None, self.log.read_text()
        try:
            return bool(self._tell("show info"))
        except OSError:  # not yet
            return False

    def _tell(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as admin:
            admin.connect(str(self._admin))
            admin.sendall(f"{command}\n".encode())
            admin.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: admin.recv(65536), b"")).decode()

    def place(self, server: str, address: str) -> None:
        """Give a server its address; it gets requests once a health check is well, as a pod is no endpoint before."""
        for command in (f"addr {address}", "state ready", "health down"):
            self._tell(f"set server {_BACKEND}/{server} {command}")

    def weigh(self, **weights: int) -> None:
        """Move weights, as an edit of the route does."""
        for server, weight in weights.items():
            said = self._tell(f"set server {_BACKEND}/{server} weight {weight}").strip()
            assert not said, said

    def is_up(self, server: str) -> bool:
        """Whether the last health checks of a server were well."""
        row = self._row(server)
        return row["status"] in ("UP", "DRAIN") and row["check_status"].endswith("L7OK")

    def is_refused(self, server: str) -> bool:
        """Whether a server says of itself, with 503, that it is not ready."""
        row = self._row(server)
        return row["status"] == "DOWN" and row["check_status"].endswith("L7STS") and row["check_code"] == "503"

    def counts(self) -> dict[str, int]:
        """What the proxy itself did or saw go wrong: retries, redispatches, and errors of connections and answers."""
        row = self._row("BACKEND")
        names = {"retries": "wretr", "redispatches": "wredis", "connect": "econ", "answer": "eresp", "5xx": "hrsp_5xx"}
        return {name: int(row[column] or 0) for name, column in names.items()}

    def _row(self, server: str) -> dict[str, str]:
        lines = self._tell("show stat").removeprefix("# ").splitlines()
        (row,) = (one for one in csv.DictReader(lines) if (one["pxname"], one["svname"]) == (_BACKEND, server))
        return row


def wait_until(condition: Callable[[], object], timeout: float, why: Callable[[], object]) -> None:
    """Until it holds; after ``timeout`` seconds ``why`` says what is wrong."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.1)


def _configuration(servers: list[str], ports: tuple[int, int], port: int, admin: Path, retries: bool) -> str:
    port_of_server, status = ports
    # A connection for each request: one that a server has just closed, being idle, would otherwise need a retry. What
    # is sent again must have been read as a whole, and a refusal does not wait for that.
    again = "retries 0"
    if retries:
        again = f"retries {_RETRIES}\n  option redispatch 1\n  retry-on 503 conn-failure\n  option http-buffer-request"
    lines = "\n".join(f"  server {name} 127.0.0.1:{port_of_server} weight 0 disabled" for name in servers)
    return f"""
global
  stats socket {admin} level admin
defaults
  mode http
  timeout connect 5s
  timeout client 300s
  timeout server 300s
  option http-server-close
  {again}
frontend clients
  bind 127.0.0.1:{port}
  default_backend {_BACKEND}
backend {_BACKEND}
  balance roundrobin
  option httpchk GET /ready
  http-check expect status 200
  timeout check 5s
  default-server check port {status} inter {_CHECK_SECONDS}s fall 2 rise 1
  http-response set-header {SERVED_BY} %s
{lines}
"""
