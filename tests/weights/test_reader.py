"""Tensors out of mapped files: every dtype, any offset, and files that changed under us."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from expo_serve.errors import CheckpointError
from expo_serve.weights.header import DTYPE_BYTES, QUANTISED_DTYPES, read_header
from expo_serve.weights.reader import Reader
from tests.models.raw import entry, file_bytes, same_bits

DATA = bytes(range(1, 17))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES.keys() - QUANTISED_DTYPES))
@pytest.mark.parametrize("before", [0, 3])
def test_every_dtype_is_read_at_any_offset(file: Path, dtype: str, before: int) -> None:
    """Nothing in the format keeps a tensor's data at a multiple of its element's size."""
    size = DTYPE_BYTES[dtype]
    data = bytes([1, 0] * size)[: 2 * size] if dtype == "BOOL" else DATA[: 2 * size]
    header = {"a": entry("U8", [before], 0, before), "b": entry(dtype, [2, 1], before, before + 2 * size)}
    file.write_bytes(file_bytes(header, bytes(before) + data))
    found = Reader().tensor(read_header(file).tensors["b"])
    assert found.shape == (2, 1)
    assert found.element_size() == size
    assert found.reshape(-1).view(torch.uint8).numpy().tobytes() == data


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3,), (2, 3, 4)])
def test_shapes_are_those_that_the_library_wrote(file: Path, shape: tuple[int, ...]) -> None:
    written = torch.randn(shape)
    save_file({"first": torch.ones(5).bfloat16(), "second": written}, file)
    found = Reader().tensor(read_header(file).tensors["second"])
    assert same_bits(found, written)
    assert found.is_contiguous()


def test_tensor_outlives_its_reader(file: Path) -> None:
    save_file({"a": torch.arange(1000)}, file)
    found = Reader().tensor(read_header(file).tensors["a"])
    assert same_bits(found, torch.arange(1000))


def test_file_that_became_shorter_is_refused(file: Path) -> None:
    save_file({"a": torch.arange(1000)}, file)
    record = read_header(file).tensors["a"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="tensor 'a' is cut: the file has become shorter"):
        Reader().tensor(record)


@pytest.mark.parametrize("content", [None, b""])
def test_file_that_is_gone_or_empty_is_refused(file: Path, content: bytes | None) -> None:
    save_file({"a": torch.arange(1000)}, file)
    record = read_header(file).tensors["a"]
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match="tensor 'a'"):
        Reader().tensor(record)
