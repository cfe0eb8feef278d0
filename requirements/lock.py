"""Resolve ``requirements/*.in`` into hashed locks: ``make lock``.

Each lock is resolved once for each supported Python, and prefers the versions that the lock already names. Where the
results differ, the line carries a marker. A universal resolution (uv's ``--universal``) cannot replace this: it reads
the metadata of one wheel per release, and some releases depend on other packages on Linux than elsewhere.

uv resolves, installed into a temporary environment. torch is left out (``torch.txt`` says why).
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PYTHONS = ("3.11", "3.12", "3.13")
UV = "uv==0.13.9"
BLOCK = re.compile(
    r"^(?P<name>[\w.-]+)==(?P<version>[^\s;]+)(?P<marker> ; [^\\\n]+?)? *(?P<hashes>\\\n(?:[ \t]+.*\n)+)", re.MULTILINE
)

Packages = dict[str, tuple[str, str]]
"""A package's version and the text of its hashes, by its name."""


@dataclass(frozen=True)
class Lock:
    """One lock: ``sources``, or else ``name.in``, resolved into ``name.txt``."""

    name: str
    flags: tuple[str, ...] = ("--override", "overrides.txt")
    before: tuple[str, ...] = ()
    """Locks installed earlier into the same environment; their packages are not repeated."""
    sources: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        """The lock itself."""
        return FOLDER / f"{self.name}.txt"


LOCKS = (
    Lock("cpu"),
    Lock("dev", before=("cpu",)),
    Lock("vision", flags=("--no-deps",)),
    Lock("stores", flags=("--no-deps",)),
    Lock("lm-eval", flags=("--no-deps",)),
    Lock("trl", flags=("--no-deps",)),
    Lock("bench", before=("cpu", "dev")),
    Lock("deploy", flags=("--override", "deploy-overrides.txt")),
    Lock("pure", sources=("../pyproject.toml", "pure.in")),
)


def resolve(uv: Path, lock: Lock, python: str, scratch: Path) -> Packages:
    """Resolve one lock for one Python."""
    out = scratch / f"{lock.name}-{python}.txt"
    out.write_text(preferences(lock.file))
    command = [str(uv), "pip", "compile", *(lock.sources or (f"{lock.name}.in",)), "--output-file", str(out)]
    command += ["--python-version", python, "--generate-hashes", "--no-header", "--no-annotate", "--quiet", *lock.flags]
    # An interpreter of that version would only be needed to build a release that has no wheels.
    subprocess.run(command, cwd=FOLDER, check=True, env={**os.environ, "UV_PYTHON_DOWNLOADS": "never"})
    had = {name for before in lock.before for name in names(FOLDER / f"{before}.txt")}
    blocks = BLOCK.finditer(out.read_text())
    return {block["name"]: (block["version"], block["hashes"]) for block in blocks if block["name"] not in had}


def preferences(file: Path) -> str:
    """Give the versions that a lock names, without the hashes: uv would keep those, and miss wheels added since."""
    blocks = BLOCK.finditer(file.read_text()) if file.exists() else ()
    return "".join(f"{block['name']}=={block['version']}{block['marker'] or ''}\n" for block in blocks)


def marker(pythons: list[str]) -> str:
    """Give the marker of a line that holds for some of ``PYTHONS``: empty where it holds for all."""
    if len(pythons) == len(PYTHONS):
        return ""
    if pythons == list(PYTHONS[-len(pythons) :]):
        return f' ; python_version >= "{pythons[0]}"'
    return " ; " + " or ".join(f'python_version == "{python}"' for python in pythons)


def merge(resolved: dict[str, Packages]) -> str:
    """Merge the results for the Pythons into the text of one lock, sorted by name."""
    holders: dict[tuple[str, str, str], list[str]] = {}
    for python, packages in resolved.items():
        for name, (version, hashes) in packages.items():
            holders.setdefault((name, version, hashes), []).append(python)
    blocks = sorted(holders.items(), key=lambda item: (item[0][0], item[1]))
    return "".join(f"{name}=={version}{marker(pythons)} {hashes}" for (name, version, hashes), pythons in blocks)


def names(file: Path) -> set[str]:
    """Give the names of a lock's packages."""
    return {block["name"] for block in BLOCK.finditer(file.read_text())}


def install_uv(folder: Path) -> Path:
    """Install uv into a new environment; give its path."""
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, UV], check=True)
    return folder / "bin/uv"


def main() -> None:
    """Make every lock anew, in the order in which they are installed."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        uv = install_uv(scratch / "uv")
        for lock in LOCKS:
            lock.file.write_text(merge({python: resolve(uv, lock, python, scratch) for python in PYTHONS}))
            print(f"{lock.file.name}: {len(names(lock.file))} packages")


if __name__ == "__main__":
    main()
