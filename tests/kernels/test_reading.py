"""Loops that read: the bytes of the plain way, and its errors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from expo_serve import kernels
from expo_serve.kernels import reading
from expo_serve.kernels.bf16 import lerp_factor
from expo_serve.load.dtypes import uint16_bits
from expo_serve.load.reader import read_runs
from expo_serve.plan.packed_format import checksum
from tests.load.lazies import Lazies, numbers
from tests.models.raw import same_bits


def test_this_machine_has_the_loops() -> None:
    """Everything below would pass without them."""
    assert kernels.available("reading.stream", "reading.gather", "reading.fetch"), kernels.reason()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A thousand bytes; a descriptor."""
    (tmp_path / "data").write_bytes(bytes(index % 251 for index in range(1000)))
    descriptor = os.open(tmp_path / "data", os.O_RDWR)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[torch.Tensor], int]]:
    """Writes a tensor into a file, and opens it."""
    descriptors: list[int] = []

    def write(values: torch.Tensor, before: int = 0) -> int:
        path = tmp_path / f"tensor-{len(descriptors)}"
        path.write_bytes(bytes(before) + values.view(torch.uint8).numpy().tobytes())
        descriptors.append(os.open(path, os.O_RDONLY))
        return descriptors[-1]

    yield write
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_extents_are_read_one_after_another(file: int, way: str, size: int) -> None:
    offsets = np.array([900, 0, 7, 7, 500])
    memory = bytearray(size * len(offsets))
    read_runs(file, memoryview(memory), offsets)
    assert bytes(memory) == b"".join(os.pread(file, size, offset) for offset in offsets)


def test_offsets_with_strides_are_taken_in_their_order(file: int, way: str) -> None:
    memory = bytearray(6)
    read_runs(file, memoryview(memory), np.arange(0, 600, 100)[::-1])
    assert list(memory) == [index % 251 for index in range(500, -1, -100)]


def test_an_end_in_the_middle_is_an_error(file: int, way: str) -> None:
    with pytest.raises(EOFError):
        read_runs(file, memoryview(bytearray(30)), np.array([0, 500, 995]))


def test_a_system_error_keeps_its_cause(file: int, way: str) -> None:
    closed = os.dup(file)
    os.close(closed)
    with pytest.raises(OSError, match="Bad file descriptor"):
        read_runs(closed, memoryview(bytearray(30)), np.array([0, 10, 20]))


@pytest.mark.parametrize("piece", [1, 7, 64, 1000])
@pytest.mark.parametrize("is_delta", [False, True])
def test_streaming_is_reading_and_combining(
    opened: Callable[..., int], piece: int, is_delta: bool
) -> None:  # fmt: skip
    base, other = torch.randn(200).bfloat16(), torch.randn(200).bfloat16()
    files = opened(base, 10), 10, opened(other, 3), 3
    memory = np.zeros(piece, np.uint16), np.zeros(piece, np.uint16)
    factor = (1.5, False) if is_delta else lerp_factor(1.5)
    out = torch.zeros_like(base)
    assert reading.stream(*files, *memory, uint16_bits(out), *factor, is_delta, False, 0, 0) == 200
    expected = (base.double() + 1.5 * other.double()).bfloat16() if is_delta else torch.lerp(base, other, 1.5)
    assert same_bits(out, expected)


@pytest.mark.parametrize("short", ["base", "other"])
def test_stream_stops_where_a_file_ends_or_a_value_is_not_finite(opened: Callable[..., int], short: str) -> None:
    values = torch.ones(100).bfloat16()
    damaged = values.clone()
    damaged[77] = torch.inf
    for other, done in ((values[:45], 40), (damaged, 70)):
        one, two = (opened(other), opened(values)) if short == "base" else (opened(values), opened(other))
        memory, out = np.zeros((2, 10), np.uint16), np.zeros(100, np.uint16)
        assert reading.stream(one, 0, two, 0, memory[0], memory[1], out, 0.5, True, False, False, 0, 0) == done
        assert set(out[:done]) == {0x3F80}


@pytest.mark.parametrize("done", [0, 1, 15, 47, 48])
def test_what_a_loop_that_stops_early_leaves_is_done_the_plain_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """A read may give less than was asked for: nothing is wrong then."""
    given = []

    stream = reading.stream

    def stop_early(*arguments: object) -> int:
        *before, out, factor, from_other, is_delta, is_dithered, key, index = arguments
        assert isinstance(out, np.ndarray)
        how = factor, from_other, is_delta, is_dithered, key, index
        given.append(stream(*before, out[:done], *how))  # type: ignore[arg-type, call-arg]
        return given[-1]

    monkeypatch.setattr(reading, "stream", stop_early)
    case = Lazies(tmp_path).make(numbers(6, 8), numbers(6, 8, seed=1))
    dest = torch.full((6, 8), 7.0, dtype=torch.bfloat16)
    assert same_bits(dest.copy_(case.lazy), case.expected)
    assert given == [done]
    assert case.lazy._pending.session.reader.activity.read_bytes == 2 * 96


@pytest.mark.parametrize("size", [0, 1, 15, 16, 240, 241, 300, 1023, 1024, 1025, 65600, 2**18, 2**18 + 2, 10**6])
@pytest.mark.parametrize("offset", [0, 7])
def test_only_bytes_with_the_checksum_of_the_xxhash_package_are_taken(
    opened: Callable[..., int], size: int, offset: int
) -> None:
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8)
    file, found = opened(raw, offset), np.zeros(size, np.uint8)
    expected = checksum(raw.numpy().tobytes())
    for piece in (100, 2**18):
        found[:] = 0
        assert reading.fetch(file, offset, found, piece, expected)
        assert np.array_equal(found, raw.numpy())
    assert not reading.fetch(file, offset, found, 2**18, expected ^ 1)
    assert not reading.fetch(file, offset, found, 2**18, expected ^ 2**63)
    if size:
        assert not reading.fetch(file, offset + 1, found, 2**18, expected)  # the file ends too early
