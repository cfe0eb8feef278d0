"""Base's blocks, read and summed by one compiled call: what the xxhash package says of the same bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from expo_serve.kernels.fetch_ir import LEAST_BYTES
from expo_serve.kernels.sparse import BaseBlock, Parts, extrapolating
from expo_serve.plan.packed_format import checksum

NOTHING = Parts()


@pytest.mark.parametrize("bytes_", [LEAST_BYTES + 1, 300, 1022, 1024, 1026, 2048, 65600, 2**18, 2**18 + 2, 10**6])
@pytest.mark.parametrize("offset", [0, 7])
def test_only_bytes_with_the_checksum_are_taken(tmp_path: Path, bytes_: int, offset: int) -> None:
    loops = extrapolating()
    assert loops
    values = torch.randn(bytes_ // 2).bfloat16()
    raw = values.view(torch.uint8).numpy().tobytes()
    (tmp_path / "base").write_bytes(bytes(offset) + raw)
    file = os.open(tmp_path / "base", os.O_RDONLY)
    found = torch.zeros_like(values)
    try:
        assert loops.load(BaseBlock(file, offset, checksum(raw)), found, NOTHING, 1.5)
        assert torch.equal(found, values)
        assert not loops.load(BaseBlock(file, offset, checksum(raw) ^ 1), found, NOTHING, 1.5)
        assert not loops.load(BaseBlock(file, offset + 2, checksum(raw)), found, NOTHING, 1.5)  # the file ends before
    finally:
        os.close(file)


def test_values_that_are_not_finite_are_noticed(tmp_path: Path) -> None:
    loops = extrapolating()
    assert loops
    values = torch.ones(200).bfloat16()
    values[170] = torch.nan
    raw = values.view(torch.uint8).numpy().tobytes()
    (tmp_path / "base").write_bytes(raw)
    file = os.open(tmp_path / "base", os.O_RDONLY)
    try:
        assert not loops.load(BaseBlock(file, 0, checksum(raw)), torch.empty_like(values), NOTHING, 1.5)
    finally:
        os.close(file)
