"""The rooms of the package and the arrows between them, read off the source: imports in functions count too."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import expo_serve
from tests.conformance.families import FAMILIES

PACKAGE = Path(expo_serve.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 500
UNKNOWN = "?"
WEIGHT_ROOMS = {"checkpoint", "plan", "kernels", "load", "write", "measure"}

ALLOWED: dict[str, set[str]] = {
    "__init__": {"version", "config", "errors", "report", "plan", "checkpoint", "sweep"},
    "version": set(),
    "__main__": {"cli"},
    "errors": set(),
    "shown": set(),
    "config": {"errors", "shown"},
    "keys": {"errors"},
    "memory": set(),
    "progress": {"errors"},
    "state": {"state", "version"},
    "report": {"version", "config"},
    "metrics": {"config", "report"},
    "checkpoint": {"checkpoint", "config", "errors", "shown"},
    "plan": {"plan", "checkpoint", "config", "errors", "shown"},
    "kernels": {"kernels"},
    "load": {"load", "kernels", "plan", "checkpoint", "config", "errors"},
    "write": {"write", "load", "plan", "checkpoint", "config", "errors", "progress", "version"},
    "measure": {"measure", "load", "kernels", "plan", "checkpoint", "config", "errors", "progress", "report"},
    "sweep": {"sweep", "version", "config", "errors", "report", "plan", "checkpoint"},
    "cli": {
        "cli",
        "sweep",
        "version",
        "config",
        "errors",
        "keys",
        "memory",
        "progress",
        "report",
        "shown",
        "state",
        "measure",
        "write",
        "plan",
        "checkpoint",
    },
    "vllm_plugin": {
        "vllm_plugin",
        "config",
        "errors",
        "keys",
        "memory",
        "metrics",
        "progress",
        "report",
        "state",
        "load",
        "measure",
        "plan",
        "checkpoint",
    },
}
"""Room or module of the package: what it may import of the package."""

NOT_FOR_WEIGHTS = {"vllm", "logging", "prometheus_client", "transformers", "argparse"}
FORBIDDEN: dict[str, set[str]] = {
    "errors": {"torch", "vllm"},
    "config": {"torch", "vllm", "os", "huggingface_hub"},
    "report": {"torch", "vllm", "os"},
    "metrics": {"torch", "vllm", "os"},
    "memory": {"torch", "vllm"},
    "progress": {"torch", "vllm", "os", "logging", "rich"},
    "checkpoint": {"torch", *NOT_FOR_WEIGHTS},
    "plan": NOT_FOR_WEIGHTS,
    "kernels": NOT_FOR_WEIGHTS,
    "load": NOT_FOR_WEIGHTS,
    "write": NOT_FOR_WEIGHTS,
    "measure": NOT_FOR_WEIGHTS,
    "state": {"vllm", "torch", "pydantic", "argparse"},
    "sweep": {"vllm", "torch", "transformers", "argparse", "prometheus_client"},
    "cli": {"vllm", "transformers"},
    "__init__": {"vllm", "torch", "pydantic"},
    "version": {"vllm", "torch", "os"},
    "__main__": {"vllm", "torch"},
}
"""What a room never imports of the world outside."""


def room(file: Path) -> str:
    """The first part of a file's name within the package."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(node: ast.AST) -> Iterator[str]:
    """Full names of all that is imported at or below a node; relative imports are not used here."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.Call):
            yield from _dynamic(child)


def _dynamic(call: ast.Call) -> Iterator[str]:
    """Names that ``import_module`` and ``__import__`` are given; computed ones are unknown."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in ("import_module", "__import__") and call.args:
        yield str(call.args[0].value) if isinstance(call.args[0], ast.Constant) else UNKNOWN


def rooms_imported(file: Path) -> set[str]:
    """Rooms and modules of the package that a file imports."""
    found = set()
    for name in imports(ast.parse(file.read_text())):
        package, _, rest = name.partition(".")
        if package == "expo_serve":
            first = rest.split(".")[0]
            found.add(first if first in ALLOWED else "__init__")
    return found


def packages_imported(file: Path) -> set[str]:
    """Top-level packages that a file imports."""
    return {name.split(".")[0] for name in imports(ast.parse(file.read_text()))}


def named(file: Path) -> str:
    """A file's name for the test's report."""
    return str(file.relative_to(PACKAGE))


def test_arrows_go_one_way() -> None:
    against = {named(file): rooms_imported(file) - ALLOWED[room(file)] for file in FILES}
    assert {file: rooms for file, rooms in against.items() if rooms} == {}


def test_room_imports_nothing_that_is_foreign_to_it() -> None:
    foreign = {named(file): packages_imported(file) & FORBIDDEN.get(room(file), set()) for file in FILES}
    assert {file: packages for file, packages in foreign.items() if packages} == {}


def test_only_the_plugin_imports_vllm_or_by_computed_names() -> None:
    found = {room(file) for file in FILES if packages_imported(file) & {"vllm", UNKNOWN}}
    assert found == {"vllm_plugin"}


def test_nothing_else_imports_the_plugin() -> None:
    assert {room(file) for file in FILES if "vllm_plugin" in rooms_imported(file)} == {"vllm_plugin"}


def names_used(file: Path) -> set[str]:
    """Attributes that a file asks for, and names that it imports from modules."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return names | {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}


def test_weights_read_no_environment() -> None:
    files = [file for file in FILES if room(file) in WEIGHT_ROOMS]
    assert len({room(file) for file in files}) == len(WEIGHT_ROOMS)
    readers = [named(file) for file in files if names_used(file) & {"environ", "getenv", "environb", "putenv"}]
    assert readers == []


def test_our_environment_variable_is_read_where_errors_are_shown() -> None:
    """Kubernetes sets variables like EXPO_SERVE_PORT beside a Service of that name, so there is no other of ours."""
    ours = {(named(file), name) for file in FILES for name in re.findall(r"[\"'](EXPO_\w+)[\"']", file.read_text())}
    assert ours == {("errors.py", "EXPO_DEBUG")}
    nodes = ast.walk(ast.parse((PACKAGE / "errors.py").read_text()))
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "os"}
    assert used == {"environ"}


def test_prefixes_of_our_lines_stand_in_one_place() -> None:
    for text in ("expo-serve: error: ", "expo-serve: warning: "):
        assert [named(file) for file in FILES if text in file.read_text()] == ["errors.py"]


def test_no_model_family_is_named() -> None:
    """Every architecture goes the same way: what only one of them needs has no place in the package."""
    families = {re.split(r"For[A-Z]|Model|LMHead|\d|_", family.architecture)[0] for family in FAMILIES}
    words = sorted(name for name in families - {"Param"} if len(name) > 3)
    named_families = re.compile(rf"(?<![a-z])({'|'.join(words)})(?![a-z])", re.IGNORECASE)
    texts = {named(file): file.read_text().replace("aria-", "") for file in FILES}  # attributes of HTML
    found = {f"{file}: {match.group()}" for file, text in texts.items() for match in named_families.finditer(text)}
    assert found == set()


def test_files_are_short_enough_to_read() -> None:
    assert [named(file) for file in FILES if len(file.read_text().splitlines()) > MAX_LINES] == []


def module_name(file: Path) -> str:
    """A file's name as a module; a package's ``__init__`` is the package."""
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def modules_imported(file: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports, also inside functions and under TYPE_CHECKING."""
    found = set()
    for name in imports(ast.parse(file.read_text())):
        while name and name not in modules:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", module_name(file)}


def test_no_imports_run_in_a_circle() -> None:
    modules = {module_name(file) for file in FILES}
    graph = {module_name(file): modules_imported(file, modules) for file in FILES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_circle_of_imports_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("def late():\n    import expo_serve.load.lazy\n")
    found = set(imports(ast.parse((tmp_path / "one.py").read_text())))
    graph = {"expo_serve.load.lazy": {"expo_serve.load.fill"}, "expo_serve.load.fill": found}
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


def _loaded_by(*modules: str) -> set[str]:
    """Top-level packages that importing these modules brings in, by whatever way."""
    code = f"import sys, {', '.join(modules)}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(result.stdout.split())


def test_command_line_loads_neither_torch_nor_vllm() -> None:
    files = [file for file in FILES if room(file) == "cli" and file.name != "__init__.py"]
    loaded = _loaded_by(*(f"expo_serve.cli.{file.stem}" for file in files))
    assert "expo_serve" in loaded
    assert not loaded & {"torch", "vllm"}


@pytest.mark.parametrize(
    "module", ["config", "errors", "report", "metrics", "memory", "progress", "checkpoint.source", "plan.prepare"]
)
def test_light_module_loads_neither_torch_nor_vllm(module: str) -> None:
    assert not _loaded_by(f"expo_serve.{module}") & {"torch", "vllm"}


def test_version_is_that_of_the_changelog() -> None:
    changelog = PACKAGE.parent / "CHANGELOG.md"
    headings = re.findall(r"^## \[?v?(\d[^\s\]]*)", changelog.read_text(), re.MULTILINE)
    assert headings[:1] == [expo_serve.__version__]
