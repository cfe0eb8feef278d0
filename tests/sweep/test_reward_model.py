"""A reward model is checked before anything is started: where it is, what its config says, whether it reads chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from expo_serve.errors import UsageError
from expo_serve.sweep.reward_model import RewardModel
from expo_serve.sweep.rewards import open_reward

CONFIG: dict[str, Any] = {"architectures": ["AnyForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a reward model, as far as it is looked at."""
    made = tmp_path / "model"
    made.mkdir()
    write(made, "config.json", CONFIG)
    write(made, "tokenizer_config.json", {"chat_template": TEMPLATE})
    (made / "model.safetensors").write_bytes(b"")
    return made


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content))


def refusal(model: str | Path) -> str:
    """What is said of a model; nothing may be started or written by it."""
    with pytest.raises(UsageError) as caught:
        RewardModel(str(model), Path("no such folder", "log"))
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"--reward vllm:{model}: ")
    return line.removeprefix(f"--reward vllm:{model}: ")


def test_reward_model_is_opened_by_its_spec(folder: Path, tmp_path: Path) -> None:
    reward = open_reward(f"vllm:{folder}", tmp_path)
    assert isinstance(reward, RewardModel)
    assert reward.spec == f"vllm:{folder}"
    assert reward.is_late
    assert reward.revision is None
    assert list(reward.score([])) == []
    assert not (tmp_path / "reward-model.log").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["AnyForSequenceClassification"], "num_labels": 1},
        {"architectures": ["AnyForSequenceClassification"], "id2label": {"0": "good"}, "num_labels": 2},
        {"architectures": ["AnyForRewardModel"]},
    ],
)
def test_config_of_a_reward_model(folder: Path, config: dict[str, Any]) -> None:
    write(folder, "config.json", config)
    assert RewardModel(str(folder), folder / "log").spec


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "found none"),
        ({"architectures": ["AnyForCausalLM"]}, "found AnyForCausalLM"),
        ({"architectures": ["AnyForProcessRewardModel"]}, "found AnyForProcessRewardModel"),
        ({"architectures": ["AnyForSequenceClassification"]}, "found 2"),
        ({"architectures": ["AnyForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}, "found 3"),
        ({"architectures": ["AnyForRewardModel"], "reward_token_id": 7}, "reward_token_id"),
    ],
)
def test_config_of_something_else(folder: Path, config: dict[str, Any], reason: str) -> None:
    write(folder, "config.json", config)
    assert reason in refusal(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), ("{", "Expecting property name"), ("[]", "expected a JSON object, found list")],
)
def test_config_that_is_none(folder: Path, content: str | None, reason: str) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    assert reason in refusal(folder)


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no weights (*.safetensors, *.bin, *.pt)" in refusal(folder)


def test_tokenizer_without_a_chat_template(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"chat_template": None})
    assert "no chat template" in refusal(folder)
    (folder / "tokenizer_config.json").unlink()
    assert "no chat template" in refusal(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert RewardModel(str(folder), folder / "log").spec


@pytest.mark.parametrize(
    "model", ["no-such-folder", "/no/such/folder", "./no/such", "a/b/c", "owner/na me", "~nobody-here/x", "x" * 5000]
)
def test_neither_folder_nor_hub_id(model: str) -> None:
    assert refusal(model) == f"{model!r} is neither a folder nor a hub id; give a reward model's"


def test_file_instead_of_a_folder(folder: Path) -> None:
    assert "is neither a folder" in refusal(folder / "config.json")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, without a hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_id_that_cannot_be_had(cache: Path) -> None:
    assert refusal("owner/name").startswith("no such folder, and not to be had from the hub: LocalEntryNotFoundError")


def test_hub_id_is_pinned_to_its_commit(cache: Path, folder: Path) -> None:
    repository = cache / "models--owner--name"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    folder.rename(repository / "snapshots" / COMMIT)
    assert RewardModel("owner/name", cache / "log").revision == COMMIT
    write(repository / "snapshots" / COMMIT, "config.json", {"architectures": ["AnyForCausalLM"]})
    assert "not a reward model" in refusal("owner/name")
