"""The folder of a sweep: what was observed is kept, and a sweep goes on only under the same settings."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from expo_serve.errors import ExpoError, UsageError
from expo_serve.sweep.observations import Loaded, Score
from expo_serve.sweep.store import Store

SCORE = Score(alpha=0.5, prompt=3, reward="python:a:b", value=0.25)
LOADED = Loaded(alpha=0.5, effective_alpha=None, deployment_id="0" * 16, load_seconds=1.0)


def reopened(store: Store) -> Store:
    """Go on with a sweep that has ended."""
    store.close()
    return Store(store.folder, {"seed": 0}, resume=True)


def test_goes_on_with_what_is_there(tmp_path: Path) -> None:
    store = Store(tmp_path / "out", {"seed": 0}, resume=False)
    assert list(store.add_all([SCORE, LOADED])) == [SCORE, LOADED]
    store = reopened(store)
    assert store.observations == [SCORE, LOADED]
    store.add(SCORE)
    store = reopened(store)
    assert len(store.observations) == 3
    store.close()


def test_a_line_that_was_cut_is_dropped(tmp_path: Path) -> None:
    store = Store(tmp_path / "out", {"seed": 0}, resume=False)
    store.add(SCORE)
    answers = tmp_path / "out/answers.jsonl"
    whole = answers.read_bytes()
    answers.write_bytes(whole + whole[:-9])
    store = reopened(store)
    assert store.observations == [SCORE]
    store.add(LOADED)
    store = reopened(store)
    assert store.observations == [SCORE, LOADED]
    store.close()


def test_a_sweep_that_is_running_is_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "out", {"seed": 0}, resume=False)
    with pytest.raises(UsageError, match="a sweep is running in"):
        Store(tmp_path / "out", {"seed": 0}, resume=True)
    store.close()


def test_refuses_other_settings(tmp_path: Path) -> None:
    Store(tmp_path / "out", {"seed": 0, "max-tokens": 256}, resume=False).close()
    with pytest.raises(UsageError, match=r"begun with other settings \(max-tokens was 256, is 128\)"):
        Store(tmp_path / "out", {"seed": 0, "max-tokens": 128}, resume=True)


def test_folders_that_are_there_or_not(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists; give a folder that does not exist yet, or --resume"):
        Store(tmp_path, {}, resume=False)
    with pytest.raises(UsageError, match="is not the folder of a sweep"):
        Store(tmp_path, {}, resume=True)
    Store(tmp_path / "out", {}, resume=False).close()
    (tmp_path / "out/answers.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match=r"answers\.jsonl, line 1 is not an observation"):
        Store(tmp_path / "out", {}, resume=True)


def test_a_full_disk_says_how_to_go_on(tmp_path: Path) -> None:
    store = Store(tmp_path / "out", {}, resume=False)
    store.add(SCORE)
    said = r"No space left on device; .* kept: make room, then give --resume --out"
    with pytest.raises(ExpoError, match=said), store.writing():
        raise OSError(errno.ENOSPC, "No space left on device", "x")
    assert store.observations == [SCORE]
    store.close()
