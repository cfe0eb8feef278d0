"""A real model's answers: the greedy tokens of plain vLLM on a merged checkpoint, and the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.compare import by_expo
from tests.engines import run_engines
from tests.models import reference_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow]
SUBJECTS = (
    "the sea", "bread", "a bicycle", "the moon", "winter", "a good friend", "music", "trees", "numbers", "coffee",
    "a train", "gardens", "the heart", "languages", "paper", "light", "a house", "rivers", "time", "games",
)  # fmt: skip


def test_twenty_prompts(demo_pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, aligned = demo_pair
    merged = reference_checkpoint(base, aligned, 0.5, tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(aligned)
    prompts = [tokenizer(f"Here is what I know about {subject}:")["input_ids"] for subject in SUBJECTS]
    small = {"enforce_eager": True}
    runs = [{"llm": {**small, "model": str(merged)}}, {"llm": {**small, "model": str(aligned), **by_expo(base, 0.5)}}]
    plain, expo = run_engines(runs, prompts, max_tokens=24)
    assert len({tuple(tokens) for tokens in plain["tokens"]}) == 20
    assert expo["tokens"] == plain["tokens"]
    assert expo["hashes"] == plain["hashes"]
