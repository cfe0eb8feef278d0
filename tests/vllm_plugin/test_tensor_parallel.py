"""Two tensor-parallel ranks: each holds the bits that plain vLLM gives it, and reads its own share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models import build_pair, reference_checkpoint
from tests.rank_state import run_ranks

pytestmark = pytest.mark.engine


def test_two_ranks(tmp_path: Path) -> None:
    loads: list[dict[str, Any]] = []
    sizes = []
    for family in ("llama", "mixtral"):
        base, aligned = build_pair(tmp_path / family, family)
        merged = reference_checkpoint(base, aligned, 0.5, tmp_path / family / "merged")
        extra = {"base": str(base), "alpha": 0.5}
        loads += [
            {"path": str(merged)},
            {"path": str(aligned), "load_format": "expo", "model_loader_extra_config": extra},
        ]
        sizes.append((aligned / "model.safetensors").stat().st_size)
    for answers in run_ranks(loads, tmp_path / "store"):
        for index, size in enumerate(sizes):
            plain, expo = answers[2 * index : 2 * index + 2]
            assert expo["hashes"] == plain["hashes"]
            assert plain["hashes"]
            for read in expo["read_bytes"].values():
                assert read < 0.56 * size  # half, and the vectors that every rank holds whole
