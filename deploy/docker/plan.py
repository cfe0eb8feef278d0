"""What the image's build installs into a base image: lists of packages, Python's picked from the project's locks.

``plan.py PROJECT OUT [whole]``, run by the base's Python, writes to OUT

- ``tools.txt``: what builds the project's wheel;
- ``locked.txt``: the whole environment where the base has no vLLM; else those of our dependencies that the base lacks;
- ``torch.txt``: torch, where the base has no vLLM (its CPU build is on no common index, so no lock has its hash);
- ``system.txt``: names of Debian packages, without versions: a pinned one is gone from the archive at its next fix.

``whole`` is for any other Python: the plan of a base without vLLM.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import tomllib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

TOOLS = ("hatchling", "packaging", "pathspec", "pluggy", "trove-classifiers")
_BLOCK = re.compile(r"^([\w.-]+)==.*\n(?:[ \t]+.*\n)*", re.MULTILINE)


def locked(folder: Path) -> dict[str, str]:
    """Every name of the two locks with its lines: version, marker and hashes; some have one version for each Python."""
    found: dict[str, str] = {}
    for name in ("cpu.txt", "dev.txt"):
        for match in _BLOCK.finditer((folder / name).read_text()):
            found[match[1]] = found.get(match[1], "") + match[0]
    return found


def missing(project: Path) -> list[str]:
    """Names of our dependencies that this Python does not have.

    Raises:
        SystemExit: it has one in a version that does not fit; replacing what the base's vLLM was tested with is no way.
    """
    from packaging.requirements import Requirement

    names, unfit = [], []
    for text in tomllib.loads((project / "pyproject.toml").read_text())["project"]["dependencies"]:
        need = Requirement(text)
        try:
            found = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            names.append(need.name.lower().replace("_", "-"))
            continue
        if not need.specifier.contains(found, prereleases=True):
            unfit.append(f"{need} (it has {found})")
    if unfit:
        raise SystemExit(f"plan.py: this base does not fit: {', '.join(unfit)}")
    return names


def system(*, whole: bool) -> list[str]:
    """Debian packages. Without a compiler (an empty COMPILER in the environment) expo-serve runs vLLM eagerly."""
    names = ["tini"]
    if whole:
        names += ["libnuma1", "util-linux"]  # vLLM's CPU extension is linked with the one, and counts cores by lscpu
        if compiler := os.environ.get("COMPILER"):
            names.append(compiler)
            headers = Path(sysconfig.get_path("include"), "Python.h")
            names += [] if headers.exists() else ["libpython3-dev"]
    return names


def main(project: Path, out: Path, *, whole: bool) -> None:
    """Write the lists."""
    locks = locked(project / "requirements")
    whole = whole or find_spec("vllm") is None
    if whole:
        rest = (project / "requirements/cpu.txt").read_text()
        torch = (project / "requirements/torch.txt").read_text()
    else:
        rest, torch = "".join(locks[name] for name in missing(project)), ""
    out.mkdir(parents=True, exist_ok=True)
    (out / "tools.txt").write_text("".join(locks[name] for name in TOOLS))
    (out / "locked.txt").write_text(rest)
    (out / "torch.txt").write_text(torch)
    (out / "system.txt").write_text("".join(f"{name}\n" for name in system(whole=whole)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), whole=sys.argv[3:] == ["whole"])
