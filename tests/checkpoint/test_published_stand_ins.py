"""The published pairs and the stand-ins for them, which were written from the same pages at another time, agree."""

from __future__ import annotations

import pytest

from expo_serve.checkpoint.published import find_pair
from tests.vllm_plugin.test_papers_pairs import PAIRS as STAND_INS


@pytest.mark.parametrize("name", STAND_INS)
def test_alphas_are_those_of_the_stand_ins(name: str) -> None:
    assert find_pair(name, "x").alpha == STAND_INS[name].alpha


@pytest.mark.parametrize("name", STAND_INS)
def test_known_formats_are_those_of_the_stand_ins(name: str) -> None:
    found, stand_in = find_pair(name, "x"), STAND_INS[name]
    for there, other in ((found.base_files, stand_in.base), (found.aligned_files, stand_in.aligned)):
        assert there.format in (None, ".bin" if other.kind == "bin" else "safetensors")
