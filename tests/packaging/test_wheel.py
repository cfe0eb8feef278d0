"""A built wheel, installed into a new environment, has its commands, its plugins and its data files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from expo_serve import __version__

pytestmark = pytest.mark.locked  # It needs hatchling.

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "expo_serve"
PLUGINS = {
    "vllm.general_plugins": "expo_serve.vllm_plugin:register",
    "vllm.endpoint_plugins": "expo_serve.vllm_plugin:endpoint_plugin",
}
JUNK = re.compile(r"__pycache__|\.py[co]$|^(tests|loadtests|deploy|\.venv|\.demo)/")


def build(target: str, folder: Path, source: Path = ROOT) -> Path:
    """Build one distribution with the backend that pyproject.toml names, without an environment of its own."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    subprocess.run(command, check=True, cwd=source, capture_output=True, timeout=60)
    (built,) = folder.iterdir()
    return built


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel, but for the record of their own hashes."""
    with zipfile.ZipFile(wheel) as files:
        return {name: files.read(name) for name in files.namelist() if not name.endswith("/RECORD")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel alone. It sees the dependencies of this one, but not this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin/python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True, timeout=60)
    (packages,) = folder.glob("lib/python*/site-packages")
    # After the environment's own packages; the checkout's own .pth file is not read from there.
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command outside of the checkout, without the caller's PYTHONPATH; give its output."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wheel_has_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    package = {str(file.relative_to(ROOT)) for file in PACKAGE.rglob("*") if file.is_file()}
    expected = {name for name in package if not JUNK.search(name)}
    assert "expo_serve/py.typed" in expected
    found = contents(wheel)
    assert {name for name in found if ".dist-info/" not in name} == expected
    assert {Path(name).name for name in found if ".dist-info/" in name} >= {"METADATA", "entry_points.txt", "LICENSE"}


def test_sdist_holds_the_package_alone_and_gives_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path / "sdist")) as files:
        names = [name.partition("/")[2] for name in files.getnames()]
        assert [name for name in names if JUNK.search(name)] == []
        assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= set(names)
        files.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert contents(build("wheel", tmp_path / "again", source)) == contents(wheel)


def test_command_answers(python: Path, tmp_path: Path) -> None:
    command = python.with_name("expo-serve")
    assert run(command, "--version", cwd=tmp_path) == f"expo-serve {__version__}\n"
    assert "--alpha" in run(command, "--help", cwd=tmp_path)
    assert run(python, "-m", "expo_serve", "--version", cwd=tmp_path) == f"expo-serve {__version__}\n"


def test_plugins_are_found_and_are_those_of_the_wheel(python: Path, tmp_path: Path) -> None:
    code = (
        "import json, expo_serve\nfrom importlib.metadata import entry_points\n"
        f"found = {{group: [(one.name, one.value, callable(one.load())) for one in entry_points(group=group)\n"
        f"                  if one.value.startswith('expo_serve')] for group in {list(PLUGINS)!r}}}\n"
        "print(json.dumps([expo_serve.__file__, found]))\n"
    )
    file, found = json.loads(run(python, "-c", code, cwd=tmp_path))
    assert Path(file).is_relative_to(python.parents[1])
    assert found == {group: [["expo", value, True]] for group, value in PLUGINS.items()}


def test_plugins_load_without_any_dependency(python: Path, tmp_path: Path) -> None:
    """vLLM loads the plugins in each of its processes, so they import nothing before they are called."""
    (packages,) = python.parents[1].glob("lib/python*/site-packages")
    code = (
        f"import sys\nsys.path.append({str(packages)!r})\nfrom importlib.metadata import distributions\n"
        "for one in distributions():\n    print(one.name, *sorted(p.value for p in one.entry_points if p.load()))\n"
    )
    # -S: no .pth file is read, so that the wheel is all there is.
    found = run(python, "-I", "-S", "-c", code, cwd=tmp_path).split()
    assert found == ["expo-serve", *sorted(["expo_serve.cli.main:main", *PLUGINS.values()])]


def test_data_files_are_readable(python: Path, tmp_path: Path) -> None:
    code = "from importlib.resources import files; print(files('expo_serve').joinpath('py.typed').is_file())"
    assert run(python, "-c", code, cwd=tmp_path) == "True\n"
