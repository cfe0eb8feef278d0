"""The download Job where something goes wrong on the way: what it says, and what its next run does."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.hub import Trouble, running_hub
from tests.deploy.weights import WANTED, Release, write_checkpoints
from tests.models import build_pair

_PIECE = 10 * 2**20
"""What `hf` writes at once: of a smaller rest nothing is kept when a connection ends."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    write_checkpoints(folder)
    return folder


@pytest.fixture
def release(tmp_path: Path, checkpoints: Path) -> Iterator[Release]:
    """Two repositories, which the Job takes in this order: aligned, base."""
    with running_hub() as hub:
        defaults = {side: f"org/{side}" for side in ("aligned", "base")}
        defaults |= {f"{side}Revision": hub.add(f"org/{side}", checkpoints / side) for side in ("aligned", "base")}
        yield Release(tmp_path, hub, defaults)


def test_a_closed_connection_goes_on_where_it_was(tmp_path: Path) -> None:
    build_pair(tmp_path, "llama-served")
    with running_hub() as hub:
        defaults = {"base": f"{tmp_path}/models/base", "aligned": "org/large"}
        release = Release(tmp_path, hub, defaults | {"alignedRevision": hub.add("org/large", tmp_path / "aligned")})
        hub.troubles["org/large/model.safetensors"] = Trouble("close", at=_PIECE + 2**20)
        result = release.job().run()
        assert result.returncode == 0, result.stderr
        assert [request.start for request in hub.requests if request.from_cdn] == [None, _PIECE]
        content = _snapshot(release, "aligned")["model.safetensors"]
        assert content == (tmp_path / "aligned/model.safetensors").read_bytes()


def test_after_a_torn_connection_complete_files_are_kept(release: Release) -> None:
    release.hub.troubles["org/base/model.safetensors"] = Trouble("tear", at=1000)
    _assert_fails_at_base(release, release.job().run(), "the download failed")
    assert not _unfinished(release)
    _assert_next_run_asks_for(release, "org/base/model.safetensors")


def test_what_a_killed_run_leaves_is_removed_in_time(release: Release) -> None:
    """After an hour: until then it may be what another release's Job is writing."""
    release.hub.troubles["org/base/model.safetensors"] = Trouble("hang", at=1000)
    process = release.job().start()
    while not (_unfinished(release) and len(_snapshot(release, "base")) == len(WANTED) - 1):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (left,) = _unfinished(release)
    os.utime(left, (time.time() - 3700,) * 2)
    written = left.with_name("written-now.incomplete")
    written.touch()
    _assert_next_run_asks_for(release, "org/base/model.safetensors")
    assert _unfinished(release) == [written]


def test_damaged_files_are_found_and_come_again(release: Release) -> None:
    """Of the right length, with other bytes: a large file, whose checksum is its own, and a small one with git's."""
    names = ["config.json", "model.safetensors"]
    for name in names:
        release.hub.troubles[f"org/base/{name}"] = Trouble("damage")
    result = release.job().run()
    _assert_fails_at_base(release, result, "the files cannot be shown to be the hub's")
    assert [name for name in names if f"{name}: expected " in result.stderr] == names
    _assert_next_run_asks_for(release, *(f"org/base/{name}" for name in names))


def _assert_fails_at_base(release: Release, result: subprocess.CompletedProcess[str], words: str) -> None:
    """With one line, the last, that says where and why; aligned is complete, and stays so."""
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("org/")]
    assert lines == result.stderr.splitlines()[-1:]
    assert lines[0].startswith(f"{_source(release, 'base')}: {words}")
    assert release.marked() == {_source(release, "aligned")}


def _assert_next_run_asks_for(release: Release, *files: str) -> None:
    """For these files only, and completes both repositories with them."""
    release.hub.requests.clear()
    result = release.job().run()
    assert result.returncode == 0, result.stderr
    assert sorted(release.hub.downloads()) == sorted(files)
    assert release.marked() == {_source(release, "aligned"), _source(release, "base")}
    commit = release.hub.repositories["org/base"].commits[release.defaults["baseRevision"]]
    assert _snapshot(release, "base") == {name: commit[name].content for name in WANTED}


def _source(release: Release, side: str) -> str:
    return f"{release.defaults[side]}@{release.defaults[f'{side}Revision']}"


def _snapshot(release: Release, side: str) -> dict[str, bytes]:
    return release.snapshot(release.defaults[side], release.defaults[f"{side}Revision"])


def _unfinished(release: Release) -> list[Path]:
    return list(release.models.rglob("*.incomplete"))
