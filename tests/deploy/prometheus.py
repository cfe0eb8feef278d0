"""A real Prometheus as a child process, and targets for it as the chart's monitors and Kubernetes would make them."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import yaml

from tests.deploy.chart import Object
from tests.deploy.tools import PROMETHEUS, need
from tests.server import free_port

_SECONDS = 30.0
_WORDS = {"sourceLabels": "source_labels", "targetLabel": "target_label"}


class Prometheus:
    """Runs while the ``with`` block does."""

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self.address = f"127.0.0.1:{free_port()}"
        self.log = folder / "log"
        self._command = [
            need(PROMETHEUS),
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self.address}",
        ]

    def __enter__(self) -> Prometheus:
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(self._command, stdout=output, stderr=subprocess.STDOUT)
        self.wait_for(self._ready)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.terminate()
        self.process.wait(10)

    def _ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx.get(f"http://{self.address}/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of the HTTP API."""
        answer = httpx.get(f"http://{self.address}/api/v1/{path}", params=parameters, timeout=10).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query."""
        result: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return result

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Until it holds; half a minute at most."""
        deadline = time.monotonic() + _SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.2)


def discovered(template: Object, namespace: str, address: str = "127.0.0.1:1", port: str = "http") -> dict[str, Any]:
    """A target with the labels that Kubernetes discovery gives a port of a rendered pod template."""
    (container,) = template["spec"]["containers"]
    assert port in [one["name"] for one in container["ports"]]
    labels = {
        "__meta_kubernetes_namespace": namespace,
        "__meta_kubernetes_pod_name": "a-pod",
        "__meta_kubernetes_pod_phase": "Running",
        "__meta_kubernetes_pod_container_port_name": port,
    }
    for kind in ("label", "annotation"):
        for name, value in template["metadata"][f"{kind}s"].items():
            labels[f"__meta_kubernetes_pod_{kind}_{re.sub(r'[^a-zA-Z0-9_]', '_', name)}"] = value
    return {"targets": [address], "labels": labels}


def scrape_jobs(monitor: Object) -> list[dict[str, Any]]:
    """What the operator makes of a monitor, a job for each endpoint, without the discovery."""
    endpoints = monitor["spec"].get("podMetricsEndpoints") or monitor["spec"]["endpoints"]
    return [_scrape_job(f"{monitor['kind']}-{endpoint['port']}", endpoint) for endpoint in endpoints]


def _scrape_job(name: str, endpoint: Object) -> dict[str, Any]:
    own = {"namespace": "__meta_kubernetes_namespace", "pod": "__meta_kubernetes_pod_name"}
    port = {"action": "keep", "source_labels": ["__meta_kubernetes_pod_container_port_name"], "regex": endpoint["port"]}
    return {
        "job_name": name,
        "metrics_path": endpoint["path"],
        "scrape_interval": endpoint["interval"],
        "relabel_configs": [
            port,
            *({"action": "replace", "source_labels": [source], "target_label": name} for name, source in own.items()),
            *({_WORDS.get(key, key): value for key, value in one.items()} for one in endpoint["relabelings"]),
        ],
    }
