"""A small packed delta with blocks of all kinds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.load.rigs import all_onto_a_device
from tests.models.packs import SMALL_BLOCK, Pack, Packs, blocks_of, tensors_of_each_coding


@pytest.fixture(scope="module")
def every_coding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pack]:
    """Not to be changed."""
    with blocks_of(SMALL_BLOCK):
        yield Packs(tmp_path_factory.mktemp("codings")).make(
            *tensors_of_each_coding(), unmatched="copy", aligned_config={"vocab_size": 15}
        )


@pytest.fixture
def damaged(every_coding: Pack, tmp_path: Path) -> Pack:
    """A copy of it, to be damaged."""
    copied = shutil.copytree(every_coding.delta, tmp_path / "delta")
    return Pack(every_coding.base, every_coding.aligned, copied, every_coding.unmatched)


@pytest.fixture(autouse=True, params=["host", pytest.param("device", marks=pytest.mark.slow)])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """All of these tests are also run with copies that go onto a simulated device."""
    if request.param == "host":
        yield
        return
    with all_onto_a_device(seed=11):
        yield
