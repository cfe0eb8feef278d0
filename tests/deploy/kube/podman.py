"""The real podman, set up for this machine without a change to it."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.deploy.chart import ROOT

DOCKER = ROOT / "deploy/docker"
_PACKAGES = ("podman", "runc", "catatonit", "netavark", "aardvark-dns", "iptables")
_PULL_SECONDS = 60
_ENOUGH = 32768


class Podman:
    """Runs podman with settings of its own (``CONTAINERS_CONF``), which replace those of /etc."""

    def __init__(self, folder: Path) -> None:
        settings = folder / "containers.conf"
        settings.write_text(_settings())
        self.environment = {**os.environ, "CONTAINERS_CONF": str(settings), "ENGINE": "podman"}
        numbers = self.run("version", "--format", "{{.Client.Version}}").stdout.split(".")
        self.is_old = (int(numbers[0]), int(numbers[1])) < (4, 4)
        self.pod_suffix = "-0" if self.is_old else ""
        """What stands behind the name of a Deployment's pod."""

    def run(self, *arguments: str, timeout: float = 120, check: bool = True) -> subprocess.CompletedProcess[str]:
        """``podman ARGUMENTS``."""
        done = subprocess.run(
            ["podman", *arguments], env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert not check or done.returncode == 0, f"podman {' '.join(arguments)}: {done.stderr[-4000:]}"
        return done

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """The same, not waited for."""
        return subprocess.Popen(["podman", *arguments], env=self.environment, stdout=subprocess.DEVNULL)

    def ask(self, template: str, name: str) -> str:
        """A value of ``podman inspect``."""
        return self.run("inspect", "--format", template, name).stdout.strip()

    def script(self, name: str, timeout: float = 900) -> float:
        """Run a script of deploy/docker; the seconds it took."""
        started = time.monotonic()
        command = [str(DOCKER / name)]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, f"{name}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return time.monotonic() - started

    def image_id(self, name: str) -> str | None:
        """Of an image in the local storage."""
        done = self.run("image", "inspect", "--format", "{{.Id}}", name, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    def pull(self, name: str) -> bool:
        """From its registry, if that is reached."""
        try:
            return self.run("pull", "--quiet", name, timeout=_PULL_SECONDS, check=False).returncode == 0
        except subprocess.TimeoutExpired:
            return False


def bring_podman() -> None:
    """Podman and what it needs, by apt where it is missing."""
    if os.geteuid() != 0:
        pytest.fail("test-kube must run as root: only root's pods have addresses that the machine itself reaches")
    if not shutil.which("podman") or not (shutil.which("catatonit") or shutil.which("tini")):
        bring(*_PACKAGES)


def bring(*packages: str) -> None:
    """Install Debian packages."""
    if not shutil.which("apt-get"):
        pytest.fail(f"not here, and there is no apt-get to bring it: {packages[0]}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-q"], ["install", "-qy", "--no-install-recommends", *packages]):
        done = subprocess.run(
            ["apt-get", *command], env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, f"apt-get {command[0]}: {done.stderr[-2000:]}"


def _settings() -> str:
    """Podman asks for more open files and processes than some machines let root give, and crun for newer cgroups."""
    limits = []
    for name, number in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC)):
        most = min(hard for hard in (resource.getrlimit(number)[1], _ENOUGH) if hard != resource.RLIM_INFINITY)
        limits.append(f'"{name}={most}:{most}"')
    runtime = 'runtime = "runc"\n' if shutil.which("runc") else ""
    return f"[containers]\ndefault_ulimits = [{', '.join(limits)}]\n[engine]\n{runtime}"
