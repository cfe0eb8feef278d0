"""Every name of vLLM that we build on is there, and one that is gone gives one clear error."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from expo_serve.cli import vllm_log
from expo_serve.errors import CompatError
from expo_serve.vllm_plugin import compat
from tests.vllm_sources import Sources, main

BASE = """
class Base:
    setting: int = 1

    def __init__(self):
        self.made = 2

    def load(self, model, config, prefix=""): ...
"""
LOADER = """
from .base import Base

if True:
    class Loader(Base):
        class Source:
            path: str

        def names(self, source): ...

def register(load_format): ...
"""


@pytest.mark.engine
@pytest.mark.parametrize("name", compat.NAMES)
def test_name_is_there(name: str) -> None:
    assert getattr(compat, name) is not None


def test_every_member_is_there() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    assert Sources(Path(spec.origin).parents[1]).missing() == []


@pytest.mark.parametrize("text", [*vllm_log.FATAL, *vllm_log.ECHOES, vllm_log.PROCESS_NAME_PREFIX[0]])
def test_words_that_are_looked_for_in_the_log_are_vllms(vllm_text: str, text: str) -> None:
    """An exception's class, which Python writes before its message, is not in the string."""
    assert text.removeprefix("RuntimeError: ") in vllm_text


@pytest.fixture(scope="module")
def vllm_text() -> str:
    """What vLLM's engine, executors and settings say."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    return "\n".join(file.read_text() for file in [root / "envs.py", *(root / "v1").rglob("*.py")])


MEMBERS = {
    "vllm.loader:Loader": ("Source", "setting", "made", "load(self, model, config)", "names(self, source)"),
    "vllm.loader:Loader.Source": ("path",),
    "vllm.loader:register": ("(load_format)",),
}


@pytest.fixture
def small_vllm(tmp_path: Path) -> Path:
    """Sources in which :data:`MEMBERS` are."""
    (tmp_path / "vllm").mkdir()
    for name, text in {"__init__": "", "base": BASE, "loader": LOADER}.items():
        (tmp_path / "vllm" / f"{name}.py").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "before", "after", "missing"),
    [
        ("base", "setting: int", "settings: int", ["vllm.loader:Loader: setting"]),
        ("base", "self.made", "self.done", ["vllm.loader:Loader: made"]),
        ("base", "model, config", "config, model", ["vllm.loader:Loader: load(self, model, config)"]),
        ("base", 'prefix=""', "prefix", ["vllm.loader:Loader: load(self, model, config)"]),
        ("loader", "path: str", "folder: str", ["vllm.loader:Loader.Source: path"]),
        ("loader", "def names(self, source): ...", "names = None", ["vllm.loader:Loader: names(self, source)"]),
        ("loader", "(load_format)", "(name)", ["vllm.loader:register: (load_format)"]),
        ("loader", "def register", "def enlist", ["vllm.loader:register: (load_format)"]),
        ("loader", "x", "x", []),
    ],
)
def test_a_member_that_is_gone(small_vllm: Path, file: str, before: str, after: str, missing: list[str]) -> None:
    source = small_vllm / "vllm" / f"{file}.py"
    text = source.read_text()
    source.write_text(text.replace(before, after))
    assert Sources(small_vllm).missing((), MEMBERS) == missing


def test_the_script_names_what_is_gone(small_vllm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(str(small_vllm)) == 1
    assert (
        "missing: DefaultModelLoader (vllm.model_executor.model_loader.default_loader:DefaultModelLoader)"
        in capsys.readouterr().out
    )


def test_a_name_that_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compat.NAMES, "deque", "vllm.no_such_module or collections")
    assert compat.deque([1]).pop() == 1


@pytest.mark.parametrize("place", ["vllm.no_such_module", "vllm.logger:no_such_name"])
def test_name_that_is_gone(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setitem(compat.NAMES, "gone", place)
    with pytest.raises(
        CompatError, match=r"^vLLM \S+ has no vllm\.(no_such_module\.gone|logger\.no_such_name) .*0\.32"
    ):
        compat.gone  # noqa: B018


def test_unknown_attribute_is_no_compat_error() -> None:
    with pytest.raises(AttributeError):
        compat.not_listed  # noqa: B018


@pytest.mark.parametrize(
    ("version", "warned"), [("0.32.0", False), ("0.33.1+cu129", False), ("0.31.9", True), ("1.0", True)]
)
def test_version_outside_the_range_is_one_warning(monkeypatch: pytest.MonkeyPatch, version: str, warned: bool) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda: version)
    warning = compat.version_warning()
    assert (warning is not None) == warned
    assert "\n" not in (warning or "")
