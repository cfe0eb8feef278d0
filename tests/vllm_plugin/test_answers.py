"""Offline, through vllm.LLM: the same weights and the same greedy tokens as plain vLLM on a merged checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import reference_checkpoint
from tests.offline import run_offline

pytestmark = pytest.mark.engine
SUBJECTS = (
    "the sea", "bread", "a bicycle", "the moon", "winter", "a good friend", "music", "trees", "numbers", "coffee",
    "a train", "gardens", "the heart", "languages", "paper", "light", "a house", "rivers", "time", "games",
)  # fmt: skip


def test_twenty_prompts(demo_pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, aligned = demo_pair
    merged = reference_checkpoint(base, aligned, 0.5, tmp_path / "merged")
    prompts = [f"Here is what I know about {subject}:" for subject in SUBJECTS]
    plain = run_offline({"model": str(merged)}, prompts)
    extra = {"base": str(base), "alpha": 0.5}
    expo = run_offline({"model": str(aligned), "load_format": "expo", "model_loader_extra_config": extra}, prompts)
    assert len(plain["tokens"]) == 20
    assert min(len(tokens) for tokens in plain["tokens"]) > 5
    assert expo["tokens"] == plain["tokens"]
    assert expo["hashes"] == plain["hashes"]
