"""What is downloaded of a repository, what the cache serves, and what is said of one without safetensors files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expo_serve.checkpoint.hub import hub_endpoint
from expo_serve.checkpoint.records import Operand
from expo_serve.checkpoint.source import HubAccess, adapter_subfolders, find_source
from expo_serve.config import Source
from expo_serve.errors import SourceError
from tests.checkpoint.test_hub_answers import use
from tests.deploy.hub import Hub, Repository, Trouble, running_hub

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, which is the library's."""
    monkeypatch.setattr("expo_serve.checkpoint.hub.sleep", lambda seconds: None)
    with running_hub() as running:
        use(monkeypatch, running.url)
        yield running


def write(folder: Path, *names: str) -> Path:
    """Write files whose content is their name; an index names the shards."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(name))
    if INDEX in names:
        (folder / INDEX).write_text(json.dumps({"weight_map": {f"t{n}": shard for n, shard in enumerate(SHARDS)}}))
    return folder


def found(cache: Path, operand: Operand = "base", **more: Any) -> Source:
    """The repository ``org/name`` from the hub or the cache."""
    revision, subfolder = more.pop("revision", None), more.pop("subfolder", None)
    return find_source(operand, "org/name", revision, HubAccess(cache_dir=str(cache), **more), subfolder=subfolder)


def files_of(source: Source) -> set[str]:
    """The files that lie in a source."""
    folder = Path(source.path)
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def refusal(cache: Path, operand: Operand = "base", **more: Any) -> str:
    """The line with which the repository is refused."""
    with pytest.raises(SourceError) as caught:
        found(cache, operand, **more)
    assert "\n" not in caught.value.message
    return caught.value.message


NEEDED = {
    *("config.json", "tokenizer.json", "chat_template.jinja", "modeling.py", INDEX, *SHARDS),
    *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "code/parts.py"),
    *("additional_chat_templates/tool.jinja", "tokenizer/tokenizer.json"),
}
NOT_NEEDED = {
    *("README.md", "LICENSE", "picture.png", "pytorch_model.bin", "consolidated.safetensors", "model.gguf"),
    *("optimizer.pt", "onnx/model.onnx", "onnx/config.json", "openvino/openvino_model.bin", "original/params.json"),
    *("checkpoint-10/model.safetensors", "checkpoint-10/config.json", "fp16/model.safetensors", ".gitattributes"),
}


def test_what_a_load_reads_is_downloaded_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("org/name", write(tmp_path / "model", *NEEDED, *NOT_NEEDED))
    source = found(tmp_path / "cache")
    assert (source.name, source.revision) == ("org/name", commit)
    assert files_of(source) == NEEDED
    assert set(hub.downloads()) == {f"org/name/{name}" for name in NEEDED}


def test_without_an_index_every_safetensors_file_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.add(
        "org/name", write(tmp_path / "model", "config.json", "a[1].safetensors", "b.safetensors", "x/c.safetensors")
    )
    assert files_of(found(tmp_path / "cache")) == {"config.json", "a[1].safetensors", "b.safetensors"}


def test_connection_that_breaks_once_is_no_trouble(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/name", write(tmp_path / "model", "config.json", "model.safetensors"))
    hub.troubles["org/name/model.safetensors"] = Trouble("tear", 3)
    assert "model.safetensors" in files_of(found(tmp_path / "cache"))


def test_adapter_beside_a_sharded_model_is_downloaded_alone(hub: Hub, tmp_path: Path) -> None:
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    hub.add("org/name", write(tmp_path / "model", "config.json", INDEX, *SHARDS, *adapter))
    assert files_of(found(tmp_path / "delta", "delta")) == {"config.json", INDEX, *adapter}
    assert files_of(found(tmp_path / "base")) == {"config.json", INDEX, *SHARDS, "adapter_config.json"}


def test_subfolder_of_a_repository_is_downloaded_alone(hub: Hub, tmp_path: Path) -> None:
    adapter = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    names = [f"{folder}/{name}" for folder in ("one", "deep/two") for name in adapter]
    commit = hub.add("org/name", write(tmp_path / "model", "config.json", "model.safetensors", *names))
    for subfolder in ("one", "deep/two"):
        source = found(tmp_path / "cache", "delta", subfolder=subfolder)
        assert (source.name, source.revision) == (f"org/name/{subfolder}", commit)
        assert files_of(source) == adapter
        hub.requests.clear()
        access = HubAccess(cache_dir=str(tmp_path / "cache"))
        assert find_source("delta", "org/name", commit, access, subfolder=subfolder) == source
        assert hub.requests == []


def test_subfolder_that_a_repository_has_not_is_answered_with_those_it_has(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/name", write(tmp_path / "model", "a/adapter_config.json", "b/adapter_config.json", "README.md"))
    line = refusal(tmp_path / "cache", "delta", subfolder="c")
    assert "the repository has no subfolder 'c'; those with an adapter are a, b" in line


def test_of_several_adapters_the_configs_come_along(hub: Hub, tmp_path: Path) -> None:
    names = [f"{folder}/adapter_{part}" for folder in ("a", "b/c") for part in ("config.json", "model.safetensors")]
    hub.add("org/name", write(tmp_path / "model", "README.md", *names))
    source = found(tmp_path / "cache", "delta")
    assert adapter_subfolders(Path(source.path)) == ["a", "b/c"]
    assert files_of(source) == {"a/adapter_config.json", "b/c/adapter_config.json"}
    assert "no safetensors file; its folders do: a, b/c" in refusal(tmp_path / "cache")


class TestCache:
    """A cache that was filled, after which the hub is away."""

    @pytest.fixture
    def commit(self, hub: Hub, tmp_path: Path) -> str:
        """The commit in the cache."""
        names = ("config.json", "tokenizer.json", "1_Pooling/config.json", "code/parts.py", INDEX, *SHARDS)
        hub.add("org/name", write(tmp_path / "model", *names))
        return found(self.cache(tmp_path)).revision or ""

    @staticmethod
    def cache(tmp_path: Path) -> Path:
        return tmp_path / "cache"

    @pytest.fixture(params=["offline", "unreachable", "out of order", "refused token"])
    def away(self, request: pytest.FixtureRequest, commit: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
        """How the hub is away."""
        if request.param == "offline":
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        elif request.param == "unreachable":
            use(monkeypatch, "http://127.0.0.1:1")
        elif request.param == "refused token":
            monkeypatch.setenv("HF_TOKEN", "hf_other")
        else:

            def fail(*given: object, **more: object) -> None:
                raise ConnectionResetError("gone")

            monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
        return str(request.param)

    @pytest.mark.parametrize("revision", [None, "main"])
    def test_whole_snapshot_is_used(
        self, away: str, commit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], revision: str | None
    ) -> None:
        assert found(self.cache(tmp_path), revision=revision).revision == commit
        warned = capsys.readouterr().err.splitlines()
        assert len(warned) == (0 if away == "offline" else 1)
        assert all(f"the hub cache is used, commit {commit[:7]}" in line for line in warned)

    @pytest.mark.parametrize("listed", [True, False])
    @pytest.mark.parametrize("missing", ["config.json", SHARDS[1]])
    def test_missing_files_are_named(self, away: str, commit: str, tmp_path: Path, missing: str, listed: bool) -> None:
        repository = self.cache(tmp_path) / "models--org--name"
        (repository / "snapshots" / commit / missing).unlink()
        if not listed:
            self._forget(repository)
        line = refusal(self.cache(tmp_path))
        assert f"holds only a part of it: {missing} is missing in " in line
        assert "run 'hf download org/name' online" in line
        assert ("offline (HF_HUB_OFFLINE)" in line) == (away == "offline")

    @staticmethod
    def _forget(repository: Path) -> None:
        """Take away the list of files, which older versions of the library do not write."""
        from huggingface_hub import _tree_cache

        shutil.rmtree(repository / "trees")
        _tree_cache._IN_MEMORY_TREE_CACHE.clear()

    def test_blob_that_was_removed_is_missing(
        self, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        snapshot = self.cache(tmp_path) / "models--org--name" / "snapshots" / commit
        (snapshot / SHARDS[0]).resolve().unlink()
        assert f"{SHARDS[0]} is missing" in refusal(self.cache(tmp_path), revision=commit)

    def test_config_alone_is_not_enough(self, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        repository = self.cache(tmp_path) / "models--org--name"
        for name in (INDEX, *SHARDS):
            (repository / "snapshots" / commit / name).unlink()
        self._forget(repository)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "model.safetensors (or its shards and their index) is missing" in refusal(self.cache(tmp_path))

    def test_module_that_is_missing_is_named_and_seldom_read_code_is_not(
        self, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        snapshot = self.cache(tmp_path) / "models--org--name" / "snapshots" / commit
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        (snapshot / "code/parts.py").unlink()
        assert found(self.cache(tmp_path)).revision == commit
        (snapshot / "1_Pooling/config.json").unlink()
        assert "1_Pooling/config.json is missing" in refusal(self.cache(tmp_path))

    def test_pinned_commit_needs_no_hub(self, commit: str, tmp_path: Path, hub: Hub) -> None:
        hub.requests.clear()
        assert found(self.cache(tmp_path), revision=commit).revision == commit
        assert hub.requests == []

    def test_what_is_missing_is_downloaded_again(self, commit: str, tmp_path: Path) -> None:
        missing = self.cache(tmp_path) / "models--org--name" / "snapshots" / commit / SHARDS[0]
        missing.unlink()
        found(self.cache(tmp_path), revision=commit)
        assert missing.exists()

    def test_other_revisions_that_are_there_are_named(
        self, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert f"which holds {commit[:7]}" in refusal(self.cache(tmp_path), revision="v1")
        assert "no such folder, not in the hub cache" in refusal(tmp_path / "other")
        assert "no such revision" in refusal(self.cache(tmp_path), revision="../../refs/main")

    def test_revision_that_the_hub_has_not_is_not_taken_from_the_cache(self, commit: str, tmp_path: Path) -> None:
        refs = self.cache(tmp_path) / "models--org--name" / "refs"
        (refs / "gone").write_text(commit)
        assert "the hub has no such revision" in refusal(self.cache(tmp_path), revision="gone")


class _WithPulls(Repository):
    """A repository with pull requests, by their revisions."""

    def commit(self, revision: str) -> str | None:
        return self.pulls.get(revision) or super().commit(revision)

    pulls: dict[str, str]


@pytest.fixture
def with_pulls(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A repository of pickles, and four pull requests of which two add safetensors files."""
    hub.add("org/name", write(tmp_path / "converted", "config.json", "model.safetensors"))
    hub.add("org/name", write(tmp_path / "model", "config.json", "pytorch_model.bin", "training_args.bin"))
    pickles, (converted, _) = hub.repositories["org/name"], list(hub.repositories["org/name"].commits)
    repository = _WithPulls(pickles.commits, pickles.main)
    repository.pulls = {f"refs/pr/{n}": converted if n in (1, 3) else pickles.main for n in (1, 2, 3, 4)}
    hub.repositories["org/name"] = repository
    return hub


def _pull(number: int, title: str, status: str = "open") -> Any:
    return SimpleNamespace(num=number, title=title, status=status, is_pull_request=True)


CONVERSION = "Adding `safetensors` variant of this model"


@pytest.mark.parametrize(
    ("pulls", "named"),
    [
        ([_pull(1, CONVERSION), _pull(2, CONVERSION), _pull(3, "Typo")], "refs/pr/1"),
        ([_pull(3, CONVERSION), _pull(1, CONVERSION)], "refs/pr/3"),
        ([_pull(3, CONVERSION, "closed"), _pull(1, CONVERSION)], "refs/pr/1"),
    ],
)
def test_pull_request_with_safetensors_is_named(
    with_pulls: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pulls: list[Any], named: str
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.get_repo_discussions", lambda self, hub_id: iter(pulls))
    line = refusal(tmp_path / "cache")
    assert "the repository holds only pickle files (pytorch_model.bin), which can run code" in line
    assert line.endswith(f"give --base-revision {named}")
    source = found(tmp_path / "cache", revision=named)
    assert files_of(source) == {"config.json", "model.safetensors"}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert found(tmp_path / "cache", revision=named) == source


def test_without_discussions_the_revisions_are_looked_at(
    with_pulls: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = SimpleNamespace(pull_requests=[SimpleNamespace(ref=f"refs/pr/{number}") for number in (1, 2, 3, 4)])
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_refs", lambda self, hub_id, include_pull_requests: refs)
    assert refusal(tmp_path / "cache", "aligned").endswith("give --aligned-revision refs/pr/3")


def test_pickles_without_a_conversion_are_told_to_be_converted(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/name", write(tmp_path / "model", "config.json", "pytorch_model.bin"))
    assert "convert them to safetensors (https://" in refusal(tmp_path / "cache")
    assert hub.downloads() == []


def test_pickles_that_are_allowed_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    shards = {"pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"}
    hub.add("org/name", write(tmp_path / "model", "config.json", "optimizer.bin", *shards))
    assert files_of(found(tmp_path / "cache", allow_pickles=True)) == {"config.json", *shards}
    hub.add("org/name", write(tmp_path / "model", "model.safetensors"))
    assert files_of(found(tmp_path / "cache", allow_pickles=True)) == {"config.json", "model.safetensors"}


def test_adapter_of_pickles_is_downloaded_if_allowed(hub: Hub, tmp_path: Path) -> None:
    names = {"adapter_config.json", "adapter_model.bin"}
    hub.add("org/name", write(tmp_path / "model", *names))
    assert "holds only pickle files (adapter_model.bin)" in refusal(tmp_path / "cache", "delta")
    assert files_of(found(tmp_path / "cache", "delta", allow_pickles=True)) == names


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("config.json", "model.gguf"), "holds GGUF files: quantised"),
        (("config.json", "tf_model.h5"), "holds no safetensors file; give one"),
        (("config.json", "fp16/model.safetensors"), "holds no safetensors file; its folders do: fp16"),
        ((), "holds no safetensors file"),
    ],
)
def test_repository_without_weights_is_refused(hub: Hub, tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    hub.add("org/name", write(tmp_path / "model", "README.md", *names))
    assert words in refusal(tmp_path / "cache")


def test_endpoint_is_the_librarys(hub: Hub) -> None:
    assert hub_endpoint() == hub.url
