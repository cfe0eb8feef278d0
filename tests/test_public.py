"""The public names of the package: a lazy re-export, which costs nothing until a name is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import expo_serve

TREE = ast.parse(Path(expo_serve.__file__).read_text())
FOR_CHECKERS = [node for node in TREE.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
NAMES = {
    alias.name: node.module
    for node in (*TREE.body, *(child for block in FOR_CHECKERS for child in block.body))
    if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("expo_serve.")
    for alias in node.names
}
"""Every public name, and the module from which type checkers are told to take it."""


def test_type_checkers_see_every_public_name_and_no_other() -> None:
    assert set(NAMES) == set(expo_serve.__all__)
    assert set(expo_serve.__all__) <= set(dir(expo_serve))


@pytest.mark.parametrize("name", NAMES)
def test_public_name_is_the_object_of_its_module(name: str) -> None:
    assert getattr(expo_serve, name) is getattr(import_module(NAMES[name]), name)


@pytest.mark.parametrize("name", ["expo_config", "_first_problem", "load"])
def test_other_names_are_no_attributes(name: str) -> None:
    """Each in a fresh process: a room becomes an attribute once something imports it."""
    code = f"import expo_serve\nassert not hasattr(expo_serve, {name!r})"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def _loaded(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after some code."""
    code = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(result.stdout.split())


def test_import_of_the_package_is_light() -> None:
    loaded = _loaded("import expo_serve")
    assert "expo_serve" in loaded
    assert not loaded & {"torch", "vllm", "pydantic", "numpy", "huggingface_hub"}


def test_public_names_load_neither_torch_nor_vllm() -> None:
    loaded = _loaded("from expo_serve import *")
    assert "pydantic" in loaded, "the names were not imported"
    assert not loaded & {"torch", "vllm"}
