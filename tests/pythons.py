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
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUPPORTED = ("3.11", "3.12", "3.13")
LOCK = ROOT / "requirements/pure.txt"
OTHERS = frozenset({"deploy", "docs"})
"""Folders of tests about the chart and the site: their tools have environments of their own."""
REQUIRED = ("test_config.py", "test_borders.py", "checkpoint", "cli", "test_without_torch.py")
"""Files and folders of tests of which at least a part must be selected."""
LEFT_OUT = "not engine and not kube and not locked"
LEAST_PASSED = 350


def main() -> int:
    """Check the other Pythons that are found, side by side; return 1 if a check fails."""
    own = sysconfig.get_python_version()
    others = [version for version in SUPPORTED if version != own]
    found = {version: path for version in others if (path := find_python(version))}
    missing = [version for version in others if version not in found]
    print(f"Python {own} is that of .venv; found: {', '.join(found) or 'no other'}", end="")
    print(f"; not here: {', '.join(missing)}" if missing else "", flush=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        wheel = build_wheel(Path(folder))
        reports = pool.map(lambda version: check(version, found[version], wheel), found)
        failures = {version: report for version, report in zip(found, reports, strict=True) if report}
    for version, report in failures.items():
        print(f"Python {version} fails:\n{report}", file=sys.stderr)
    return 1 if failures else 0


def find_python(version: str) -> Path | None:
    """Find the command ``python3.x``, on PATH or among pyenv's versions, and check that it runs."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    on_path = shutil.which(f"python{version}")
    candidates = [Path(on_path)] if on_path else []
    candidates += sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"))
    for candidate in candidates:
        if not _failure(str(candidate), "-c", ""):  # pyenv's shims exist for versions that are not switched on
            return candidate
    return None


def check(version: str, python: Path, wheel: Path) -> str:
    """Run all checks under one Python; return the output of those that fail."""
    folder = ROOT / ".pythons" / version
    own = folder / "bin/python"
    if report := make_environment(folder, python) or _failure(*_install(own), "--no-index", str(wheel)):
        return report
    # Analysed by this Python and for it, with the installed packages of .venv: torch is there alone.
    types = ["--python-executable", sys.executable, "--python-version", version]
    reports = [
        _failure(str(own), "-m", "ruff", "check", "--quiet", "."),
        _failure(str(own), "-m", "mypy", *types),
        run_tests(version, own),
    ]
    return "".join(reports)


def build_wheel(folder: Path) -> Path:
    """Build the project's wheel; it is the same for every Python.

    Raises:
        subprocess.CalledProcessError: the build failed; its own message is on stderr.
    """
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    (wheel,) = folder.iterdir()
    return wheel


def make_environment(folder: Path, python: Path) -> str:
    """Make an environment of the lock, unless it is there; return the output of a step that fails."""
    stamp = folder / "stamp"
    wanted = hashlib.sha256(f"{python.resolve()}\n{LOCK.read_text()}".encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return ""
    shutil.rmtree(folder, ignore_errors=True)
    if report := _failure(str(python), "-m", "venv", str(folder)):
        return report
    if report := _failure(*_install(folder / "bin/python"), "--require-hashes", "-r", str(LOCK)):
        return report
    stamp.write_text(wanted)
    return ""


def run_tests(version: str, python: Path) -> str:
    """Run the selected tests and print how many passed; return a report if one fails or too few are left."""
    files = select(TestFiles.read(ROOT / "tests"), python)
    absent = [name for name in REQUIRED if not any(name in file.relative_to(ROOT / "tests").parts for file in files)]
    if absent:
        return f"no test of {', '.join(absent)} can run without torch\n"
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", LEFT_OUT, *map(str, files)]
    code, output = _run(*command)
    passed = _passed(output)
    if code or passed < LEAST_PASSED:
        return f"{output}expected at least {LEAST_PASSED} tests that pass, none that is skipped, and no warning\n"
    print(f"Python {version}: {passed} tests of {len(files)} files passed, ruff and mypy ran", flush=True)
    return ""


def _passed(output: str) -> int:
    """The number of tests in pytest's last line, 0 if that names anything but passed and deselected ones."""
    found = re.fullmatch(r"(\d+) passed(?:, \d+ deselected)? in .*", output.rstrip().rpartition("\n")[2])
    return int(found[1]) if found else 0


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


def _install(python: Path) -> list[str]:
    """The command that installs just what is named after it, again if it is there."""
    return [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--force-reinstall",
    ]


def _run(*command: str) -> tuple[int, str]:
    """Run a command in the checkout; give its exit code and all of its output."""
    result = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return result.returncode, result.stdout


def _failure(*command: str) -> str:
    """Run a command; give its output if it fails, else nothing."""
    code, output = _run(*command)
    return f"$ {' '.join(command)}\n{output}" if code else ""


if __name__ == "__main__":
    sys.exit(main())
