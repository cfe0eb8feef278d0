"""Loops that read: the bytes of the plain way, and its errors."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from expo_serve import kernels
from expo_serve.kernels import bf16, dither, reading
from expo_serve.kernels.bf16 import lerp_factor
from expo_serve.load.dtypes import uint16_bits
from expo_serve.load.reader import read_runs
from expo_serve.plan.packed_format import checksum
from tests.load.lazies import Lazies, numbers
from tests.models.raw import same_bits


@pytest.fixture(autouse=True)
def compiled() -> None:
    """A loop that is called before it was asked for would be compiled for other types, for the whole process."""
    loops: tuple[kernels.Loop, ...] = (
        "bf16.combine",
        "dither.fill",
        "reading.stream",
        "reading.gather",
        "reading.fetch",
    )
    assert kernels.available(*loops), kernels.reason()


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


class Sides:
    """Two operands in files, also mapped, and memory for their results."""

    def __init__(self, opened: Callable[..., int], base: torch.Tensor, other: torch.Tensor, results: int) -> None:
        self.files = opened(base, 10), opened(other, 4)
        self.maps = [mmap.mmap(file, 0, prot=mmap.PROT_READ) for file in self.files]
        self.places = [np.frombuffer(each, np.uint8).ctypes.data for each in self.maps]
        self.memory = np.zeros(2 * results + 192, np.uint8)
        self.results = results

    def stream(self, piece: int, is_mapped: bool, is_non_temporal: bool, start: int = 0, **how: object) -> torch.Tensor:
        """Stream into memory that begins ``start`` values behind a line of the cache; return what is done."""
        aligned = -self.memory.ctypes.data % 64 + 2 * start
        out = self.memory[aligned : aligned + 2 * self.results].view(np.uint16)
        out[:] = 7
        table = np.zeros(1, reading.BLOCK)
        fields = {
            "base_file": self.files[0], "other_file": self.files[1], "base_offset": 10, "other_offset": 4,
            "base": self.places[0] + 10, "other": self.places[1] + 4, "out": out.ctypes.data, "size": self.results,
            "factor": 0.5, "from_other": True, **how,
        }  # fmt: skip
        for name, value in fields.items():
            table[name] = value
        pieces = np.zeros((2, piece), np.uint16)
        reading.stream(table, pieces[0].ctypes.data, pieces[1].ctypes.data, piece, is_mapped, is_non_temporal)
        done = int(table["done"][0])
        assert (out[done + piece :] == 7).all()
        return torch.from_numpy(out[:done].view(np.int16).copy()).view(torch.bfloat16)


WAYS = [(False, False), (False, True), (True, False), (True, True)]
"""Mapped or read, past the cache or not."""


@pytest.mark.parametrize("piece", [1, 7, 64, 1000])
@pytest.mark.parametrize("is_delta", [False, True])
@pytest.mark.parametrize(("is_mapped", "is_non_temporal"), WAYS)
@pytest.mark.parametrize("start", [0, 1, 31])
def test_streaming_is_reading_and_combining(
    opened: Callable[..., int], piece: int, is_delta: bool, is_mapped: bool, is_non_temporal: bool, start: int
) -> None:
    base, other = torch.randn(200).bfloat16(), torch.randn(200).bfloat16()
    factor, from_other = (1.5, False) if is_delta else lerp_factor(1.5)
    how = {"factor": factor, "from_other": from_other, "is_delta": is_delta}
    found = Sides(opened, base, other, 200).stream(piece, is_mapped, is_non_temporal, start, **how)
    expected = (base.double() + 1.5 * other.double()).bfloat16() if is_delta else torch.lerp(base, other, 1.5)
    assert same_bits(found, expected)


@pytest.mark.parametrize(("is_mapped", "is_non_temporal"), WAYS)
@pytest.mark.parametrize("index", [0, 1, 4095, 2**33 - 5])
def test_dithered_bits_depend_on_the_element_alone(
    opened: Callable[..., int], is_mapped: bool, is_non_temporal: bool, index: int
) -> None:
    base, other = torch.randn(9001).bfloat16(), torch.randn(9001).bfloat16()
    noise = np.empty(9001, np.uint16)
    dither.fill(np.array([index]), 9001, 77, noise)
    expected = torch.empty_like(base)
    sides = uint16_bits(base), uint16_bits(other)
    assert bf16.combine(*sides, uint16_bits(expected), 0.5, True, False, noise)
    how = {"is_dithered": True, "key": 77, "index": index}
    for piece in (33, 8192):
        found = Sides(opened, base, other, 9001).stream(piece, is_mapped, is_non_temporal, **how)
        assert same_bits(found, expected)


@pytest.mark.parametrize("short", ["base", "other"])
@pytest.mark.parametrize("is_non_temporal", [False, True])
def test_stream_stops_where_a_file_ends_or_a_value_is_not_finite(
    opened: Callable[..., int], short: str, is_non_temporal: bool
) -> None:
    values = torch.ones(100).bfloat16()
    damaged = values.clone()
    damaged[77] = torch.inf
    for other, done in ((values[:45], 40), (damaged, 70)):
        sides = Sides(opened, *((other, values) if short == "base" else (values, other)), 100)
        found = sides.stream(10, False, is_non_temporal)
        assert len(found) == done
        assert same_bits(found, values[:done])


def test_blocks_go_on_after_one_that_stops(opened: Callable[..., int]) -> None:
    values, damaged = torch.ones(100).bfloat16(), torch.ones(100).bfloat16()
    damaged[0] = torch.nan
    files, out = (opened(values), opened(damaged), opened(values)), np.zeros(300, np.uint16)
    table = np.zeros(3, reading.BLOCK)
    table["base_file"], table["other_file"] = files[0], files
    table["size"], table["factor"], table["from_other"] = 100, 0.5, True
    table["out"] = out.ctypes.data + 200 * np.arange(3)
    pieces = np.zeros((2, 64), np.uint16)
    reading.stream(table, pieces[0].ctypes.data, pieces[1].ctypes.data, 64, False, False)
    assert table["done"].tolist() == [100, 0, 100]
    assert set(out[:100]) | set(out[200:]) == {0x3F80}


@pytest.mark.parametrize("done", [0, 1, 15, 47, 48])
def test_what_a_loop_that_stops_early_leaves_is_done_the_plain_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """A read may give less than was asked for: nothing is wrong then."""
    given: list[int] = []
    stream = reading.stream

    def stop_early(table: reading.Blocks, *arguments: int) -> None:
        table["size"] = done
        stream(table, *arguments)  # type: ignore[arg-type]  # two of them are booleans
        given.extend(table["done"])

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
