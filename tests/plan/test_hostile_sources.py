"""Sources that would make a command read or copy other files, wait, or take one tensor for another."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from expo_serve.config import ExpoConfig, deployment_id, parse_config
from expo_serve.errors import ConfigError, PairError
from expo_serve.plan.matching import base_names
from expo_serve.plan.prepare import prepare
from tests.command import refused, run_here
from tests.models.adapters import factors, write_adapter
from tests.models.raw import tiny_tensors, write_pair, write_raw

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base, aligned = write_pair(tmp_path)
    (aligned / "tokenizer.json").write_text("{}")
    return base, aligned


def flags(base: Path, aligned: Path) -> list[str]:
    return ["--base", str(base), "--aligned", str(aligned), "--alpha", "0.5"]


def test_companion_that_is_a_link_out_of_the_checkpoint_is_not_copied(pair: tuple[Path, Path], tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (pair[1] / "notes.txt").symlink_to(secret)
    out = tmp_path / "out"
    words = ("notes.txt", "link leaves the checkpoint", "--allow-links")
    refused("merge", *flags(*pair), "--out", str(out), words=words)
    assert not out.exists()
    result = run_here("merge", *flags(*pair), "--out", str(out), "--allow-links", str(tmp_path))
    assert (result.returncode, (out / "notes.txt").read_text()) == (0, "mine")


def _fifo(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def _link_to_zeros(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize("spoil", [_fifo, _link_to_zeros])
def test_tokenizer_that_never_ends_is_not_read(pair: tuple[Path, Path], spoil: Any) -> None:
    for side in pair:
        spoil(side / "tokenizer.json")
    started = time.monotonic()
    assert run_here("inspect", *flags(*pair)).returncode == 0
    assert time.monotonic() - started < 20


def test_tokenizer_outside_of_the_checkpoint_is_not_shown(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps({"SECRET": 0}))
    (pair[0] / "vocab.json").symlink_to(tmp_path / "other.json")
    (pair[1] / "tokenizer.json").unlink()
    (pair[1] / "vocab.json").write_text(json.dumps({"word": 0}))
    assert "SECRET" not in run_here("inspect", *flags(*pair), "--json").stdout


@pytest.mark.parametrize("folder", ["", "  ", "~nosuchuser/x", "a\0b"])
def test_odd_folder_for_links_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="allow_links"):
        parse_config({"base": "b", "alpha": 0.5, "allow_links": [folder]})


def test_adapters_of_one_repository_are_two_deployments() -> None:
    one, two = (ExpoConfig(delta="org/adapters", delta_subfolder=name, alpha=0.5) for name in ("one", "two"))
    assert deployment_id(one, "org/base", None) != deployment_id(two, "org/base", None)


def test_pattern_that_takes_forever_is_refused(tmp_path: Path) -> None:
    base = write_raw(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", factors(MODULE, 8, 8), rank_pattern={"(a|a)*b": 2})
    refused(
        "inspect", "--base", str(base), "--delta", str(adapter), "--alpha", "0.5", words=("(a|a)*b", "repeats a group")
    )


def test_name_that_may_mean_two_stacks_is_not_guessed(tmp_path: Path) -> None:
    base = {f"{prefix}.layers.0.self_attn.q_proj.weight": torch.zeros(8, 8).bfloat16()
            for prefix in ("model.language_model", "talker.model")}  # fmt: skip
    folder = write_raw(tmp_path / "base", {**base, "model.language_model.embed_tokens.weight": torch.zeros(16, 8)})
    adapter = write_adapter(tmp_path / "adapter", factors(MODULE, 8, 8))
    with pytest.raises(PairError, match=r"several tensors of base could be meant|lacks"):
        prepare(ExpoConfig(base=str(folder), delta=str(adapter), alpha=0.5))
    name = f"{MODULE}.weight"
    assert base_names([name], dict.fromkeys(base)) == {name: name}  # type: ignore[arg-type]  # only names count


def test_output_of_the_language_part_is_no_tower(tmp_path: Path) -> None:
    """Whatever it is called: it lies in the branch of those that are paired."""
    text = {name: tensor for name, tensor in tiny_tensors().items() if name != "lm_head.weight"}
    whole = {f"language_model.{name}": tensor for name, tensor in tiny_tensors(1).items() if name != "lm_head.weight"}
    whole["language_model.output.weight"] = torch.zeros(16, 8).bfloat16()
    whole["vision_model.patch.weight"] = torch.zeros(4, 4).bfloat16()
    kind: dict[str, Any] = {"architectures": ["LlamaModel"], "tie_word_embeddings": False}
    base = write_raw(tmp_path / "base", text, **kind)
    parts: dict[str, Any] = {
        "model_type": "chat",
        "architectures": ["ChatModel"],
        "text_config": {"model_type": "llama"},
    }
    aligned = write_raw(tmp_path / "aligned", whole, **parts)
    refused("inspect", *flags(base, aligned), words=("1 tensor is in one checkpoint only (1 in aligned",))
    del whole["language_model.output.weight"]
    write_raw(aligned, whole, **parts)
    found = json.loads(run_here("inspect", *flags(base, aligned), "--json").stdout)
    assert (found["refusals"], found["counts"]) == ([], {"extrapolated": len(text), "copied": 1})


def test_embedding_of_a_tower_has_a_vocabulary_of_its_own(tmp_path: Path) -> None:
    more = {"model.embed_vision.embedding.weight": torch.zeros(4, 8).bfloat16()}
    sides = (
        write_raw(tmp_path / side, {**tiny_tensors(seed), **more}) for seed, side in enumerate(("base", "aligned"))
    )
    assert run_here("inspect", *flags(*sides)).returncode == 0
