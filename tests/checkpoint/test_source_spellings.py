"""Sources as other tools take them are answered with their right spelling; folders of that name win."""

from __future__ import annotations

from pathlib import Path

import pytest

from expo_serve.checkpoint.records import Operand
from expo_serve.checkpoint.source import HubAccess, adapter_subfolders, find_source
from expo_serve.checkpoint.spellings import right_spelling
from expo_serve.errors import SourceError

HERE = "https://hub.example"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPELLINGS: dict[str, str] = {
    "org/name@main": "--base org/name --base-revision main",
    "org/name@refs/pr/1": "--base org/name --base-revision refs/pr/1",
    "org/name:v1.0": "--base org/name --base-revision v1.0",
    "gpt2@main": "--base gpt2 --base-revision main",
    "org/name+org/lora": "--base org/name --delta org/lora",
    "org/name+lora": "--base org/name --delta lora",
    "models--org--name": "--base org/name",
    "models--gpt2": "--base gpt2",
    "org/name/tree/main": "--base org/name --base-revision main",
    "huggingface.co/org/name": "--base org/name",
    "https://huggingface.co/org/name": "--base org/name",
    "https://huggingface.co/org/name/": "--base org/name",
    "http://hf.co/org/name": "--base org/name",
    "https://huggingface.co/models/org/name": "--base org/name",
    "https://huggingface.co/org/name/tree/v1": "--base org/name --base-revision v1",
    "https://huggingface.co/org/name/tree/refs%2Fpr%2F3": "--base org/name --base-revision refs/pr/3",
    "https://huggingface.co/org/name/tree/refs/pr/3": "--base org/name --base-revision refs/pr/3",
    f"https://huggingface.co/org/name/commit/{COMMIT}": f"--base org/name --base-revision {COMMIT}",
    "https://huggingface.co/org/name/blob/main/config.json": "--base org/name --base-revision main",
    "https://huggingface.co/org/name?library=vllm#use": "--base org/name",
    "https://hub.example/org/name": "--base org/name",
    "hub.example/org/name": "--base org/name",
    "hf://org/name": "--base org/name",
    "hf://org/name@v1": "--base org/name --base-revision v1",
    "hf://models/org/name": "--base org/name",
    "https://huggingface.co/datasets/org/name": "a model's repository (this is one of datasets)",
    "https://huggingface.co/org": "--base ORGANISATION/NAME",
}
NONE_OF_THEIRS = (
    *("org/name", "name", "s3://bucket/model", "gs://bucket/name", "file:///x", "x/y/z", "https://other.example/a/b"),
    *("./org/name@main", "/data/a+b", "a b@c", "org/name@", "@main", "http://[::1", "C:\\models\\x", "~/x@y/z w"),
)


@pytest.mark.parametrize("given", SPELLINGS)
def test_spelling_of_other_tools_is_answered(given: str) -> None:
    assert (right_spelling("base", given, HERE) or "").endswith(SPELLINGS[given])


@pytest.mark.parametrize("given", NONE_OF_THEIRS)
def test_others_are_left_alone(given: str) -> None:
    assert right_spelling("base", given, HERE) is None


def test_flags_are_those_of_the_operand() -> None:
    assert right_spelling("aligned", "a/b+c/d", HERE) == "--base a/b --delta c/d in place of --aligned"
    address = "https://huggingface.co/org/name/tree/main/adapters/one"
    assert right_spelling("delta", address, HERE) == (
        "--delta org/name --delta-revision main --delta-subfolder adapters/one"
    )


@pytest.mark.parametrize("given", ["org/name@main", "models--org--name", "hf://org/name", "a/b+c"])
def test_source_is_refused_with_the_right_spelling(given: str) -> None:
    with pytest.raises(SourceError, match=r"is neither a folder nor a hub id; give --base \S+") as caught:
        find_source("base", given, None, HubAccess())
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("given", ["org/name@main", "models--org--name", "hf:/org/name", "a/b+c", "org/name:v1"])
def test_folder_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    (tmp_path / given).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_source("base", given, None, HubAccess()).path == str((tmp_path / given).resolve())


def test_repository_of_the_cache_is_no_checkpoint(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    with pytest.raises(SourceError, match="repository of the hub cache, not a checkpoint; give --aligned org/name"):
        find_source("aligned", str(repository), None, HubAccess())


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """A folder of several adapters, and of what is none."""
    folder = tmp_path / "adapters"
    for name in ("one", "deep/two", ".hidden", "much/too/deep"):
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_text("{}")
    (folder / "other").mkdir()
    return folder


def test_subfolders_with_adapters_are_listed(adapters: Path) -> None:
    assert adapter_subfolders(adapters) == ["deep/two", "one"]
    assert adapter_subfolders(adapters / "other") == []


@pytest.mark.parametrize("subfolder", ["one", "one/", "./one", "deep/two"])
def test_subfolder_is_the_source(adapters: Path, subfolder: str) -> None:
    found = find_source("delta", str(adapters), None, HubAccess(), subfolder=subfolder)
    assert found.path == str((adapters / subfolder).resolve())
    assert found.name == Path(subfolder).name
    assert found.revision is None


def test_dot_is_the_folder_itself(adapters: Path) -> None:
    assert find_source("delta", str(adapters), None, HubAccess(), subfolder=".").path == str(adapters.resolve())


def test_subfolder_that_is_missing_is_answered_with_those_that_are_there(adapters: Path) -> None:
    with pytest.raises(SourceError, match="has no subfolder 'three'; those with an adapter are deep/two, one"):
        find_source("delta", str(adapters), None, HubAccess(), subfolder="three")
    with pytest.raises(SourceError, match="has no subfolder 'x'; none of them holds an adapter"):
        find_source("delta", str(adapters / "other"), None, HubAccess(), subfolder="x")


@pytest.mark.parametrize("operand", ["base", "aligned", "delta"])
@pytest.mark.parametrize("subfolder", ["..", "one/../..", "/etc", "", "a\\b", "a\nb"])
def test_subfolder_stays_inside(adapters: Path, operand: Operand, subfolder: str) -> None:
    with pytest.raises(SourceError, match="expected the path of a folder inside the source"):
        find_source(operand, str(adapters), None, HubAccess(), subfolder=subfolder)


def test_subfolder_does_not_lead_out_by_a_link(adapters: Path, tmp_path: Path) -> None:
    (adapters / "link").symlink_to(tmp_path)
    with pytest.raises(SourceError, match="leads out of"):
        find_source("delta", str(adapters), None, HubAccess(), subfolder="link")


def test_subfolder_of_a_snapshot_keeps_the_commit(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / COMMIT
    (snapshot / "one").mkdir(parents=True)
    found = find_source("delta", str(snapshot), None, HubAccess(), subfolder="one")
    assert (found.name, found.revision, found.path) == ("org/name/one", COMMIT, str(snapshot / "one"))
