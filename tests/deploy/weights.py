"""A release whose hub and weights volume are on this machine."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deploy.chart import Values, pick, render
from tests.deploy.container import Container, Secrets
from tests.deploy.hub import Hub
from tests.models import build_pair
from tests.models.deltas import write_lora

WANTED = {"config.json", "generation_config.json", "model.safetensors"}
"""What is needed of a checkpoint."""
LEFT_OUT = {"pytorch_model.bin", "optimizer.pt", "original/consolidated.00.pth", "onnx/model.onnx"}
"""What lies beside it, as in many repositories: other forms of the weights, and pickles."""
_READ_ONLY = """
mount --bind "$0" "$0"
mount -o remount,bind,ro "$0"
if touch "$0/written" 2>&-; then echo "$0 can be written" >&2; exit 9; fi
exec "$@"
"""


def write_checkpoints(folder: Path) -> None:
    """``base``, ``aligned`` and an ``adapter``."""
    base, aligned = build_pair(folder)
    write_lora(base, folder / "adapter")
    for side in (base, aligned):
        for name in LEFT_OUT:
            (side / name).parent.mkdir(exist_ok=True)
            torch.save({"weight": torch.ones(8)}, side / name)


@dataclass
class Release:
    """Rendered anew for each question, so that what is changed here is an upgrade. The weights lie in ``models``."""

    folder: Path
    hub: Hub
    defaults: dict[str, str]
    variants: dict[str, dict[str, str]] = field(default_factory=lambda: {"mild": {"alpha": "0.3"}})
    download: Values = field(default_factory=dict)
    more: Values = field(default_factory=dict)
    secrets: Secrets = field(default_factory=dict)

    @property
    def models(self) -> Path:
        return self.folder / "models"

    def values(self) -> Values:
        weights = {
            "mountPath": str(self.models),
            "volume": {"existingClaim": "weights"},
            "download": {"enabled": True, "endpoint": self.hub.url, **self.download},
        }
        return {"variants": self.variants, "defaults": self.defaults, "weights": weights, **self.more}

    def job(self) -> Container:
        return self._container(pick(render(self.values()), "Job"), "containers")

    def waiting(self, variant: str = "mild") -> Container:
        """What runs before a pod's server."""
        return self._container(pick(render(self.values()), "Deployment", f"-{variant}"), "initContainers")

    def server(self, variant: str = "mild") -> Container:
        return self._container(pick(render(self.values()), "Deployment", f"-{variant}"), "containers")

    def _container(self, workload: Any, kind: str) -> Container:
        (container,) = workload["spec"]["template"]["spec"][kind]
        self.models.mkdir(exist_ok=True)
        return Container(container, self.folder, self.secrets, entrypoint=["expo-serve"])

    def marker(self, source: str) -> Path:
        return self.models / ".complete" / source.replace("/", "%")

    def marked(self) -> set[str]:
        """Sources that pods do not wait for."""
        return {path.name.replace("%", "/") for path in self.models.glob(".complete/*")}

    def cached(self, name: str) -> Path:
        """A repository's folder in the cache."""
        return self.models / "hub" / f"models--{name.replace('/', '--')}"

    def snapshot(self, name: str, commit: str) -> dict[str, bytes]:
        """The files of a commit that are there."""
        folder = self.cached(name) / "snapshots" / commit
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def inspect_offline(self, variant: str = "mild") -> subprocess.CompletedProcess[str]:
        """What a pod's server does first: find the sources of its command line, without network, read-only."""
        server = self.server(variant)
        assert server.environment["HF_HUB_OFFLINE"] == "1"
        sources = [word for word in server.args if word.startswith(("--base", "--aligned", "--delta", "--alpha"))]
        before = [*unshare("--mount", "--net"), "sh", "-ec", _READ_ONLY, str(self.models)]
        return server.run(before=before, args=["inspect", *sources])


def unshare(*namespaces: str) -> list[str]:
    """Words in front of a command that give it namespaces of its own, as a container has them."""
    command = ["unshare", *namespaces, *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip(f"this machine does not allow `{' '.join(command)}`, which stands for the container here")
    return command
