"""Run ruff, mypy and the tests that need neither torch nor an engine under the machine's other supported Pythons.

``python -m tests.pythons``, with the Python of ``.venv``. Each other Python gets a small environment from
``requirements/pure.txt`` in ``.pythons``, and the built wheel. A Python that the machine lacks is no error.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUPPORTED = ("3.11", "3.12", "3.13")
LOCK = ROOT / "requirements/pure.txt"
OTHERS = frozenset({"deploy", "docs"})
"""Folders of tests about the chart and the site: their tools have environments of their own."""
REQUIRED = ("test_config.py", "test_borders.py", "checkpoint", "cli", "plan", "packaging")
"""Files and folders of tests of which at least a part must be selected."""
LEFT_OUT = "not engine and not kube and not locked"
LEAST_PASSED = 300


def main() -> int:
    """Check every other Python that is found; return 1 if one of the checks fails."""
    own = sysconfig.get_python_version()
    found = {version: path for version in SUPPORTED if version != own and (path := find_python(version))}
    missing = [version for version in SUPPORTED if version != own and version not in found]
    print(f"Python {own} is checked by the other tests; found: {', '.join(found) or 'no other'}", end="")
    print(f"; not here: {', '.join(missing)}" if missing else "", flush=True)
    failed = [version for version, path in found.items() if not check(version, path)]
    for version in failed:
        print(f"Python {version}: failed", file=sys.stderr)
    return 1 if failed else 0


def find_python(version: str) -> Path | None:
    """Find the command ``python3.x``, on PATH or among pyenv's versions, and check that it runs."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    on_path = shutil.which(f"python{version}")
    candidates = [Path(on_path)] if on_path else []
    candidates += sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"))
    for candidate in candidates:
        if _run([str(candidate), "-c", ""], quiet=True):  # pyenv's shims exist for versions that are not switched on
            return candidate
    return None


def check(version: str, python: Path) -> bool:
    """Run all three checks, so that one report shows everything."""
    folder = ROOT / ".pythons" / version
    make_environment(folder, python)
    tools = folder / "bin"
    # torch's types are those of .venv, and the analysis is that of this Python and for it.
    types = ["--python-executable", sys.executable, "--python-version", version]
    results = [
        _run([str(tools / "ruff"), "check", "--quiet", "."]),
        _run([str(tools / "python"), "-m", "mypy", "--no-error-summary", *types]),
        run_tests(version, tools / "python"),
    ]
    return all(results)


def make_environment(folder: Path, python: Path) -> None:
    """Make or renew one environment. The wheel is built and installed each time.

    Raises:
        subprocess.CalledProcessError: a step failed; its own message is on stderr.
    """
    stamp = folder / "stamp"
    wanted = hashlib.sha256(f"{python.resolve()}\n{LOCK.read_text()}".encode()).hexdigest()
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([str(python), "-m", "venv", str(folder)], check=True)
        subprocess.run([*pip, "--require-hashes", "-r", str(LOCK)], check=True)
        stamp.write_text(wanted)
    wheels = folder / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(wheels)]
    subprocess.run(build, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    subprocess.run([*pip, "--no-index", "--force-reinstall", *map(str, wheels.glob("*.whl"))], check=True)


def run_tests(version: str, python: Path) -> bool:
    """Run the selected tests; report how many passed, and fail where the selection has become too small."""
    files = select(TestFiles.read(ROOT / "tests"), python)
    absent = [name for name in REQUIRED if not any(name in file.relative_to(ROOT / "tests").parts for file in files)]
    if absent:
        print(f"Python {version}: no test of {', '.join(absent)} can run without torch", file=sys.stderr)
        return False
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", LEFT_OUT, *map(str, files)]
    result = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=False)
    passed = re.search(r"^(\d+) passed(?!.*(skipped|failed|error))", result.stdout.rsplit("\n", 2)[-2], re.MULTILINE)
    if result.returncode or passed is None or int(passed[1]) < LEAST_PASSED:
        print(result.stdout)
        print(f"Python {version}: expected at least {LEAST_PASSED} tests that pass and none skipped", file=sys.stderr)
        return False
    print(f"Python {version}: {passed[1]} tests of {len(files)} files passed", flush=True)
    return True


@dataclass(frozen=True)
class TestFiles:
    """Test files, and the packages outside this project that importing each of them needs."""

    __test__ = False

    needs: dict[Path, frozenset[str]]

    @classmethod
    def read(cls, folder: Path) -> TestFiles:
        """Read the imports of all test files below a folder, through everything of this project that they import."""
        files = [file for file in sorted(folder.rglob("test_*.py")) if file.relative_to(folder).parts[0] not in OTHERS]
        return cls({file: frozenset(_needs(file, folder)) for file in files})


def select(files: TestFiles, python: Path) -> list[Path]:
    """Select the files whose needs this Python can all import."""
    names = sorted(set().union(*files.needs.values()))
    code = "import sys; from importlib.util import find_spec; print(*(n for n in sys.argv[1:] if find_spec(n)))"
    result = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, check=True)
    available = set(result.stdout.split())
    return [file for file, needs in files.needs.items() if needs <= available]


def _needs(file: Path, folder: Path) -> Iterator[str]:
    """Top-level names from outside; ``vllm`` for whatever imports our plugin, which finds most of vLLM by name.

    A test file counts whole, since its functions run. Of what it imports, only what an import executes counts.
    """
    waiting = [parent / "conftest.py" for parent in file.parents if parent.is_relative_to(folder)]
    seen: set[Path] = set()
    names = set(_imported(ast.walk(ast.parse(file.read_text()))))
    while names or waiting:
        for name in names:
            ours = list(_files(name))
            waiting += ours
            if not ours:
                yield name.split(".")[0]
            elif name.startswith("expo_serve.vllm_plugin"):
                yield "vllm"
        names = set()
        while waiting and not names:
            module = waiting.pop()
            if module not in seen and module.exists():
                seen.add(module)
                names = set(_imported(_executed(ast.parse(module.read_text()).body)))


def _files(name: str) -> Iterator[Path]:
    """Files of this project that an import executes: the packages on the way, and the module itself."""
    parts = name.split(".")
    if parts[0] not in ("tests", "expo_serve", "loadtests"):
        return
    for end in range(1, len(parts) + 1):
        place = ROOT.joinpath(*parts[:end])
        yield from (path for path in (place / "__init__.py", place.with_suffix(".py")) if path.exists())


def _executed(body: Iterable[ast.stmt]) -> Iterator[ast.AST]:
    """Statements that an import executes: neither in functions nor under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _executed(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))


def _imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Full names that import statements among these nodes name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _run(command: list[str], *, quiet: bool = False) -> bool:
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
