"""Files in the address space: a file that is cut while it is mapped is an error with its name, and no SIGBUS."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from expo_serve import kernels
from expo_serve.errors import CheckpointError
from expo_serve.kernels import guard
from expo_serve.load import mapping, sizes
from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.reader import Reader
from expo_serve.load.selection import FileSpan
from expo_serve.load.session import LoadSession, load_into
from expo_serve.load.ways import Way, Ways
from tests.load.lazies import NAME, Lazies, numbers
from tests.models.raw import same_bits
from tests.models.reference import extrapolate

PAGES = 64


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Pages full of ones."""
    path = tmp_path / "data"
    path.write_bytes(b"\x01" * (PAGES * mmap.PAGESIZE))
    return path


@pytest.fixture(autouse=True)
def everything_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks are taken from mappings, and stored past the cache."""
    assert kernels.available("bf16.combine", "reading.stream"), kernels.reason()
    monkeypatch.setattr(Ways, "choose", lambda ways, size: Way(is_mapped=True, is_non_temporal=True))


def resident_pages(path: Path) -> int:
    """Pages of a file that this process has in its resident set."""
    kibibytes = 0
    is_of_file = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            is_of_file = line.endswith(str(path))
        elif is_of_file and line.startswith("Rss:"):
            kibibytes += int(line.split()[1])
    return kibibytes * 1024 // mmap.PAGESIZE


def test_a_page_that_is_gone_reads_as_zeros_and_is_told(file: Path) -> None:
    guard.install()
    with file.open("r+b") as opened:
        mapped = np.frombuffer(mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
        number = guard.watch(mapped.ctypes.data, mapped.size)
        assert number is not None
        assert int(mapped[:: mmap.PAGESIZE].sum()) == PAGES
        assert not guard.has_faulted(number)
        os.ftruncate(opened.fileno(), 3 * mmap.PAGESIZE)
        assert int(mapped[:: mmap.PAGESIZE].sum()) == 3
        assert guard.has_faulted(number)
        guard.unwatch(number)


def test_a_fault_elsewhere_still_ends_the_process(file: Path) -> None:
    """Ours is no handler for the mappings of others: theirs would go on with zeros."""
    code = (
        "import mmap, os, sys\n"
        "from expo_serve.kernels import guard\n"
        "guard.install()\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
        "os.ftruncate(file.fileno(), 0)\n"
        "print(mapped[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], check=False, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGBUS
    assert done.stdout == b""


def test_a_handler_that_took_its_place_is_replaced_and_kept(file: Path) -> None:
    guard.install()
    before = signal.signal(signal.SIGBUS, signal.SIG_IGN)
    try:
        guard.install()
        test_a_page_that_is_gone_reads_as_zeros_and_is_told(file)
    finally:
        signal.signal(signal.SIGBUS, before or signal.SIG_DFL)


def test_spans_are_released(file: Path) -> None:
    with file.open("rb") as opened:
        mapped = mapping.map_file(file, opened.fileno())
        assert mapped
        part = FileSpan("base", file, opened.fileno(), 10, (PAGES - 1) * mmap.PAGESIZE)
        address = mapped.address_of(part)
        assert address
        view = np.ctypeslib.as_array((ctypes.c_uint8 * part.length).from_address(address))
        assert int(view.sum()) == part.length
        assert resident_pages(file) >= PAGES - 2
        mapped.release(part)
        assert resident_pages(file) <= 2


def test_what_cannot_be_mapped_is_read(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    with empty.open("rb") as opened:
        assert mapping.map_file(empty, opened.fileno()) is None
    with file.open("rb") as opened:
        mapped = mapping.map_file(file, opened.fileno())
        assert mapped
        assert mapped.address_of(FileSpan("base", file, opened.fileno(), 1, 4)) is None
        assert mapped.address_of(FileSpan("base", file, opened.fileno(), 0, PAGES * mmap.PAGESIZE + 2)) is None
        monkeypatch.setattr(mapping, "is_on_network", lambda path: True)
        assert mapping.map_file(file, opened.fileno()) is None


@pytest.mark.parametrize("size", [(3, 5), (1000, 700)])
def test_bits_are_those_of_reads(tmp_path: Path, size: tuple[int, int]) -> None:
    case = Lazies(tmp_path).make(numbers(*size), numbers(*size, seed=1), rounding="dithered")
    dest = torch.empty(size, dtype=torch.bfloat16)
    assert same_bits(dest.copy_(case.lazy), case.expected)
    assert any(case.lazy._pending.session.reader._mapped.values())


def test_a_file_that_is_cut_before_it_is_mapped_is_an_error_with_its_name(tmp_path: Path) -> None:
    plan = Lazies(tmp_path).plan({NAME: numbers(500, 500)}, {NAME: numbers(500, 500, seed=1)})
    lazy = lazy_tensor(plan.tensors[NAME], LoadSession(Reader()))
    (path,) = plan.base.files
    os.truncate(path, 200_000)
    with pytest.raises(CheckpointError, match=rf"{path}: tensor '{NAME}' is cut"):
        torch.empty(500, 500, dtype=torch.bfloat16).copy_(lazy)


def test_a_file_that_is_cut_while_it_loads_is_an_error_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At twenty moments of a load: it fails by the name of the file, or was faster and is right."""
    monkeypatch.setattr(sizes, "BLOCK_BYTES", 1 << 20)
    base, aligned = numbers(2048, 2048), numbers(2048, 2048, seed=1)
    expected = extrapolate(base, aligned, 0.5, None)
    failures = []
    for moment in range(20):
        plan = Lazies(tmp_path / str(moment)).plan({NAME: base}, {NAME: aligned})
        model = torch.nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16)
        (path,) = plan.aligned_or_delta.files

        def cut(path: Path = path, moment: int = moment) -> None:
            time.sleep(moment * 0.0005)
            os.truncate(path, 1_000_000)

        cutter = threading.Thread(target=cut)
        try:
            with load_into(model, threads=2) as session:
                lazy = lazy_tensor(plan.tensors[NAME], session)
                cutter.start()
                model.weight.data.copy_(lazy)
                session.settle()
            assert same_bits(model.weight.data, expected)
        except CheckpointError as error:
            failures.append((path, str(error)))
        cutter.join()
        path.unlink()
    assert failures, "no moment was early enough"
    for path, message in failures:
        assert message == f"{path}: tensor {NAME!r} is cut: the file has become shorter"
