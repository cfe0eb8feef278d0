"""A built wheel, installed into an empty environment, is the whole package: entry points, data files, metadata."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "expo_serve"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Run by the empty environment's Python; nothing of the checkout is on its path.
LOOK = """
import json, sys
from importlib import metadata
own = metadata.distribution("expo-serve")
print(json.dumps({
    "files": sorted(str(file) for file in own.files if file.locate().is_file()),
    "entry_points": sorted([point.group, point.name, point.value] for point in own.entry_points),
    "requires": own.requires,
    "version": own.version,
    "loaded": {point.value: callable(point.load()) for point in own.entry_points},
    "others": sorted({one.name for one in metadata.distributions()} - {"expo-serve"}),
}))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel and nothing else, not even pip."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run([*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), str(ROOT)])
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    run([*pip, "--python", str(folder / "env"), "install", "--no-deps", "--no-index", str(wheel)])
    return folder / "env"


@pytest.fixture(scope="module")
def installed(environment: Path) -> dict[str, Any]:
    """What the empty environment's Python finds of the installed package."""
    found: dict[str, Any] = json.loads(run([str(environment / "bin/python"), "-I", "-c", LOOK]))
    return found


def run(command: list[str]) -> str:
    """Run a command outside the checkout and give its output; fail with what it printed."""
    result = subprocess.run(command, cwd="/", text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_environment_was_empty(installed: dict[str, Any]) -> None:
    assert installed["others"] == []


def test_every_file_of_the_package_is_installed(installed: dict[str, Any]) -> None:
    """The data files too: py.typed, and whatever else is not Python."""
    files = (file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    wanted = {str(file.relative_to(ROOT)) for file in files}
    assert "expo_serve/py.typed" in wanted
    found = {file for file in installed["files"] if not file.endswith(".pyc")}
    assert {file for file in found if file.startswith("expo_serve/")} == wanted


def test_entry_points_are_those_declared(installed: dict[str, Any]) -> None:
    groups = {"console_scripts": PROJECT["scripts"], **PROJECT["entry-points"]}
    wanted = [[group, name, value] for group, points in groups.items() for name, value in points.items()]
    assert {group for group, _, _ in wanted} == {"console_scripts", "vllm.general_plugins", "vllm.endpoint_plugins"}
    assert installed["entry_points"] == sorted(wanted)


def test_metadata_names_the_dependencies(installed: dict[str, Any]) -> None:
    plain = {line for line in installed["requires"] if "extra ==" not in line}
    assert len(plain) == len(PROJECT["dependencies"])
    assert installed["version"] not in ("", "0.0.0")


def test_entry_points_load_without_any_dependency(installed: dict[str, Any]) -> None:
    """vLLM loads the plugins in each of its processes, so that they import nothing before they are called."""
    assert installed["loaded"] == {value: True for _, _, value in installed["entry_points"]}


def test_script_runs(environment: Path, installed: dict[str, Any]) -> None:
    assert run([str(environment / "bin/expo-serve"), "--version"]).split()[-1] == installed["version"]
