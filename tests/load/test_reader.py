"""Tensors out of files by positioned reads: every dtype, any offset, any view, and files that fail under us."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from expo_serve.checkpoint.header import read_header
from expo_serve.checkpoint.records import DTYPES, QUANTISED_DTYPES, TensorRecord
from expo_serve.errors import CheckpointError
from expo_serve.load.dtypes import meta_tensor
from expo_serve.load.reader import Reader
from expo_serve.load.selection import Selection
from tests.faults import before_reads, fail_from
from tests.models.raw import entry, file_bytes, same_bits

DATA = bytes(range(1, 17))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def read(record: TensorRecord, view: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> torch.Tensor:
    """What a view of a stored tensor gives."""
    reader = Reader()
    reader.check(record)
    return reader.read(record, Selection.of(view(meta_tensor(record))), "a")


@pytest.mark.parametrize("dtype", sorted(DTYPES.keys() - QUANTISED_DTYPES))
@pytest.mark.parametrize("before", [0, 3])
def test_every_dtype_is_read_at_any_offset(file: Path, dtype: str, before: int) -> None:
    """Nothing in the format keeps a tensor's data at a multiple of its element's size."""
    size = DTYPES[dtype].itemsize
    data = bytes([1, 0] * size)[: 2 * size] if dtype == "BOOL" else DATA[: 2 * size]
    header = {"a": entry("U8", [before], 0, before), "b": entry(dtype, [2, 1], before, before + 2 * size)}
    file.write_bytes(file_bytes(header, bytes(before) + data))
    found = read(read_header(file).tensors["b"])
    assert found.shape == (2, 1)
    assert found.element_size() == size
    assert found.reshape(-1).view(torch.uint8).numpy().tobytes() == data


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3,), (2, 3, 4)])
def test_shapes_are_those_that_the_library_wrote(file: Path, shape: tuple[int, ...]) -> None:
    written = torch.randn(shape)
    save_file({"first": torch.ones(5).bfloat16(), "second": written}, file)
    found = read(read_header(file).tensors["second"])
    assert same_bits(found, written)
    assert found.is_contiguous()


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows": lambda t: t[2:5],
    "columns": lambda t: t[:, :, 3:7],
    "one column": lambda t: t[:, :, 5],
    "every other": lambda t: t[::2, :, ::2],
    "far apart": lambda t: t[::5, 0, 0],
    "transposed": lambda t: t.transpose(0, 2),
    "part of a transpose": lambda t: t.transpose(1, 2)[1:4, 2:6],
    "repeated": lambda t: t[:, :, None, 2:4].expand(6, 5, 3, 2),
    "repeated whole": lambda t: t.expand(2, 6, 5, 8),
    "overlapping": lambda t: t.view(-1).unfold(0, 4, 2),
    "nothing": lambda t: t[:, 3:3],
    "nothing scattered": lambda t: t[6:, :, ::2],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_select_what_they_select_in_memory(file: Path, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    whole = torch.arange(240).view(6, 5, 8)
    save_file({"a": whole}, file)
    assert same_bits(read(read_header(file).tensors["a"], view), view(whole))


def test_columns_cost_their_own_bytes(file: Path) -> None:
    save_file({"a": torch.arange(240).view(6, 5, 8)}, file)
    record, reader = read_header(file).tensors["a"], Reader()
    reader.read(record, Selection.of(meta_tensor(record)[:, :, 3:7]), "a")
    assert reader.activity.read_bytes == 120 * 8


def test_a_buffer_is_used_again_and_each_thread_has_its_own(file: Path) -> None:
    save_file({"a": torch.arange(64)}, file)
    record, reader = read_header(file).tensors["a"], Reader()
    first, second = Selection.flat(0, 8), Selection.flat(8, 8)
    one = reader.read(record, first, "a")
    other = reader.read(record, first, "b")
    assert reader.read(record, second, "a").data_ptr() == one.data_ptr() != other.data_ptr()
    places = []
    thread = threading.Thread(target=lambda: places.append(reader.read(record, first, "a").data_ptr()))
    thread.start()
    thread.join()
    assert places[0] != one.data_ptr()
    assert one.tolist() == list(range(8, 16))


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=30))
def test_short_reads_are_continued(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    """A read may give less than was asked for: network file systems and signals do that."""
    file = tmp_path_factory.mktemp("short") / "model.safetensors"
    written = torch.randn(5, 7)
    save_file({"a": written}, file)
    given = iter(sizes)

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(descriptor, [buffers[0][: next(given, 999)]], offset)

    preadv = os.preadv
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", short)
        assert same_bits(read(read_header(file).tensors["a"]), written)


def test_file_that_became_shorter_is_refused(file: Path) -> None:
    save_file({"a": torch.arange(1000)}, file)
    record = read_header(file).tensors["a"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="tensor 'a' is cut: the file has become shorter"):
        Reader().check(record)


def test_file_that_shrinks_while_it_is_read_is_an_error(file: Path) -> None:
    """A mapping would kill the process here."""
    save_file({"a": torch.arange(1000)}, file)
    record, reader = read_header(file).tensors["a"], Reader()
    reader.check(record)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="tensor 'a' is cut: the file has become shorter"):
        reader.read(record, Selection.flat(0, 1000), "a")
    assert reader.activity.reading == {}


def test_storage_that_fails_is_named_with_its_cause(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.arange(1000)}, file)
    record = read_header(file).tensors["a"]
    before_reads(monkeypatch, fail_from(0, OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor 'a' cannot be read: Input/output error"):
        read(record)


@pytest.mark.parametrize("content", [None, b""])
def test_file_that_is_gone_or_empty_is_refused(file: Path, content: bytes | None) -> None:
    save_file({"a": torch.arange(1000)}, file)
    record = read_header(file).tensors["a"]
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match="tensor 'a'"):
        Reader().check(record)


def test_a_read_that_hangs_can_be_seen(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.arange(1000)}, file)
    record, reader = read_header(file).tensors["a"], Reader()
    go_on = threading.Event()
    before_reads(monkeypatch, lambda _: go_on.wait(10))
    thread = threading.Thread(target=reader.read, args=(record, Selection.flat(0, 1000), "a"))
    assert reader.activity.slowest() is None
    thread.start()
    while not (slowest := reader.activity.slowest()):
        time.sleep(0.01)
    assert slowest[0] == (file,)
    assert 0 <= slowest[1] < 10
    go_on.set()
    thread.join()
    assert reader.activity.slowest() is None


def test_files_are_closed_with_the_reader(file: Path) -> None:
    save_file({"a": torch.arange(10)}, file)
    before = os.listdir("/proc/self/fd")
    read(read_header(file).tensors["a"])
    assert os.listdir("/proc/self/fd") == before
