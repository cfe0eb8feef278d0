"""Cold ranges are read in order before anybody is told, and whoever waits is told whatever happens."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from expo_serve.load import sizes
from expo_serve.load.counts import ReadActivity
from expo_serve.load.read_ahead import ReadAhead
from expo_serve.load.selection import FileSpan
from tests.faults import Read, before_reads, fail_from

MEGABYTE = 1 << 20
CHUNK_BYTES = sizes.READ_AHEAD_BYTES
PATH = Path("model.safetensors")


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """Five megabytes; a descriptor."""
    (tmp_path / "data").write_bytes(bytes(5 * MEGABYTE))
    descriptor = os.open(tmp_path / "data", os.O_RDWR)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def ahead() -> Iterator[ReadAhead]:
    made = ReadAhead(ReadActivity())
    yield made
    made.close()
    for thread in threading.enumerate():
        if thread.name.startswith("expo-ahead"):
            thread.join(10)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Offset and length of the reads; everything is cold."""
    found: list[tuple[int, int]] = []
    before_reads(monkeypatch, lambda read: found.append((read.offset, read.size)), is_cold=True)
    return found


def waited(ahead: ReadAhead, *spans: FileSpan) -> None:
    done = threading.Event()
    if ahead.defer(spans, done.set):  # looking at the last page may already have made the kernel read it
        assert done.wait(10)


def test_a_cold_file_is_known_by_its_last_page_and_becomes_warm(file: int, ahead: ReadAhead) -> None:
    whole = FileSpan("base", PATH, file, 0, 5 * MEGABYTE)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    assert not whole.is_cached()
    waited(ahead, whole)
    assert whole.is_cached()


def test_what_is_cached_is_not_read_again_and_needs_no_thread(file: int, ahead: ReadAhead) -> None:
    called: list[int] = []
    assert not ahead.defer([FileSpan("base", PATH, file, 3, MEGABYTE)], lambda: called.append(1))
    assert called == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("expo-ahead")] == []


@pytest.mark.parametrize("error", [OSError(errno.EOPNOTSUPP, "no"), OSError(errno.EINVAL, "no")])
def test_where_the_system_cannot_say_nothing_is_read_ahead(
    file: int, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def refuse(*_: object) -> int:
        raise error

    monkeypatch.setattr(os, "preadv", refuse)
    assert FileSpan("base", PATH, file, 0, MEGABYTE).is_cached()


def test_each_side_is_read_in_order_by_chunks(file: int, ahead: ReadAhead, reads: list[tuple[int, int]]) -> None:
    waited(ahead, FileSpan("base", PATH, file, 10, 2 * MEGABYTE + 7), FileSpan("base", PATH, file, 3 * MEGABYTE, 100))
    assert reads == [
        (10, CHUNK_BYTES),
        (10 + CHUNK_BYTES, CHUNK_BYTES),
        (10 + 2 * CHUNK_BYTES, 7),
        (3 * MEGABYTE, 100),
    ]


def test_both_sides_go_at_once_and_the_later_one_tells(
    file: int, ahead: ReadAhead, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2, timeout=10)
    told: list[str] = []

    def meet(read: Read) -> None:
        both.wait()
        assert not read.offset or first.wait(10)
        told.append(threading.current_thread().name)
        first.set()

    before_reads(monkeypatch, meet, is_cold=True)
    done, first = threading.Event(), threading.Event()
    ahead.defer([FileSpan("base", PATH, file, 0, 9), FileSpan("aligned", PATH, file, 9, 9)], done.set)
    assert done.wait(10)
    assert told == ["expo-ahead-base-0", "expo-ahead-aligned-0"]


def test_a_read_that_fails_is_left_to_whoever_needs_it(
    file: int, ahead: ReadAhead, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_reads(monkeypatch, fail_from(0, OSError(errno.EIO, "no")), is_cold=True)
    waited(ahead, FileSpan("base", PATH, file, 0, 2 * MEGABYTE))
    waited(ahead, FileSpan("base", PATH, file, 0, 2 * MEGABYTE))


def test_a_file_that_ends_early_is_no_endless_loop(file: int, ahead: ReadAhead, reads: list[tuple[int, int]]) -> None:
    waited(ahead, FileSpan("base", PATH, file, 4 * MEGABYTE, 50 * MEGABYTE))
    assert len(reads) == 2


def test_its_threads_end_with_it(file: int, reads: list[tuple[int, int]]) -> None:
    ahead = ReadAhead(ReadActivity())
    waited(ahead, FileSpan("base", PATH, file, 0, MEGABYTE), FileSpan("aligned", PATH, file, 0, MEGABYTE))
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("expo-ahead")]
    assert len(threads) == 2
    ahead.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_read_that_hangs_can_be_seen(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, activity = threading.Event(), ReadActivity()
    before_reads(monkeypatch, lambda _: go_on.wait(10), is_cold=True)
    ahead, done = ReadAhead(activity), threading.Event()
    ahead.defer([FileSpan("base", PATH, file, 0, 9)], done.set)
    while not (slowest := activity.slowest()):
        time.sleep(0.01)
    assert slowest[0] == (PATH,)
    go_on.set()
    assert done.wait(10)
    ahead.close()
