"""Fixtures that tests of several rooms share. A server costs half a minute: one serves a whole session."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.server import Server
from tests.vllm_plugin.trees import LIMIT_SECONDS, assert_all_gone

pytest_plugins = ("tests.tiers",)
ROOT = Path(__file__).parents[1]
DEMO = ROOT / ".demo"
OF_CALLERS = ("EXPO_DEBUG", "HF_TOKEN", "PYTHONUNBUFFERED", "VLLM_PLUGINS", "VLLM_API_KEY", "VLLM_SERVER_DEV_MODE")
API_KEY = "a-key-for-tests"
ALPHA = "0.5"


def pytest_configure() -> None:
    """Take what a script in the background ignores (SIGINT), or one under nohup (SIGHUP), with all of its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on what the caller's environment says."""
    for name in OF_CALLERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def without_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no loop can be compiled."""
    monkeypatch.setattr("expo_serve.kernels.available", lambda *loops: False)


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest) -> str:
    """Run a test both ways: with compiled loops, and as where none can be compiled."""
    if request.param == "plain":
        request.getfixturevalue("without_loops")
    return str(request.param)


@pytest.fixture(scope="session")
def demo_pair() -> tuple[Path, Path]:
    """The demo's real base and aligned checkpoints."""
    prepare = [sys.executable, str(ROOT / "deploy/demo/prepare.py"), "--out", str(DEMO)]
    subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
    return DEMO / "base", DEMO / "aligned"


@pytest.fixture(scope="session")
def tiny_pair(demo_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny pair with eight heads and a real tokenizer, for servers whose answers do not matter."""
    from tests.models import build_pair  # It imports torch, which not every test needs.

    base, aligned = build_pair(tmp_path_factory.mktemp("tiny"), "llama-served")
    for file in demo_pair[1].glob("tokenizer*"):
        shutil.copy(file, aligned)
    return base, aligned


@pytest.fixture(scope="session")
def server(demo_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo pair served by the real command at alpha 0.5, with an API key and two served names.

    Half of the flags come from a file; its alpha loses to the command line's.
    Without --enforce-eager, but with a compiler that is not there: it must start all the same. Its end
    is a test too: SIGTERM while serving drains, leaves no process, and exits 0.
    """
    base, aligned = demo_pair
    folder = tmp_path_factory.mktemp("server")
    flags = {"base": str(base), "alpha": 9, "served_model_name": ["first", "second"], "max-model-len": 512}
    (folder / "flags.yaml").write_text(yaml.safe_dump(flags))
    arguments = ["--config", str(folder / "flags.yaml"), "--aligned", str(aligned), "--alpha", ALPHA]
    arguments += ["--shutdown-timeout", "5"]
    running = Server(arguments, folder / "log", VLLM_API_KEY=API_KEY, CXX="no-such-compiler")
    running.api_key = API_KEY
    try:
        yield running.wait_ready()
        family, started = running.family(), time.monotonic()
        assert running.stop() == 0
        assert_all_gone(family)
        assert time.monotonic() - started < LIMIT_SECONDS
    finally:
        running.process.kill()
