"""How fast could a pair be loaded on this machine? What is beneath every load, without vLLM and without Python between.

Rates of the parts: memory read and copied, files read by `pread` and through mappings, by threads and size of the
piece. And the limit: the compiled loop of pairs over both files from end to end in each of its ways, into memory that
was touched before. The fastest of them is what a load of the same pair can reach at best; `load_time` runs it and says
how far from it the load is.

    python -m loadtests.roofline [--size demo|1.1b] [--rounds 5]
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from expo_serve import kernels
from expo_serve.kernels import reading
from expo_serve.kernels.bf16 import lerp_factor
from expo_serve.load import sizes
from expo_serve.load.ways import Way
from loadtests.page_cache import warm
from loadtests.pairs import Pair, pair_of, weight_files
from loadtests.results import ALPHA, parser, save, shown, spread, table, turns

_BLOCK = sizes.BLOCK_BYTES
_PIECES = (256 << 10, 1 << 20, 4 << 20)
_THREADS = (1, 2)
_WAYS = [Way(is_mapped, is_non_temporal) for is_mapped in (False, True) for is_non_temporal in (False, True)]
Work = Callable[[int], object]
"""Does the block that begins at this byte."""


def in_threads(work: Work, size: int, threads: int) -> float:
    """Do all blocks of so many bytes in threads; return the seconds."""
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        for _ in pool.map(work, range(0, size, _BLOCK)):
            pass
        return time.perf_counter() - started


class Side:
    """The largest file of one side of a pair, open and mapped."""

    def __init__(self, file: Path, stack: ExitStack) -> None:
        self.descriptor = os.open(file, os.O_RDONLY)
        stack.callback(os.close, self.descriptor)
        self.size = file.stat().st_size // _BLOCK * _BLOCK or file.stat().st_size // 8 * 8
        self.map()

    def map(self) -> None:
        """Map the file anew, with none of its pages in the resident set."""
        self.mapped = np.frombuffer(mmap.mmap(self.descriptor, 0, prot=mmap.PROT_READ), np.uint8)


def _parts(side: Side, out: npt.NDArray[np.uint8]) -> Iterator[tuple[str, Callable[[int], float]]]:
    """What a load is made of; each takes a number of threads and returns the seconds for one side."""

    def words(memory: npt.NDArray[np.uint8], block: int) -> npt.NDArray[np.uint64]:
        return memory[block : block + _BLOCK].view(np.uint64)

    yield "memory, read", lambda threads: in_threads(lambda block: words(out, block).max(), side.size, threads)
    half = side.size // 2 // _BLOCK * _BLOCK
    copied: Work = lambda block: np.copyto(words(out, block), words(out, half + block))  # noqa: E731
    yield "memory, copied (half)", lambda threads: in_threads(copied, half, threads)
    for piece in _PIECES:
        buffers = threading.local()

        def read(block: int, piece: int = piece, buffers: Any = buffers) -> None:
            if not hasattr(buffers, "memory"):
                buffers.memory = memoryview(bytearray(piece))
            for offset in range(block, min(block + _BLOCK, side.size), piece):
                os.preadv(side.descriptor, [buffers.memory], offset)

        yield f"pread, {piece >> 10} KiB", partial(in_threads, read, side.size)

    def mapped(threads: int) -> float:
        side.map()
        return in_threads(lambda block: words(side.mapped, block).max(), side.size, threads)

    yield "mapping, read", mapped


def _streams(base: Side, aligned: Side, out: npt.NDArray[np.uint8]) -> Iterator[tuple[str, Callable[[int], float]]]:
    """The compiled loop over the whole pair, in each of its ways, dithered."""
    size = min(base.size, aligned.size)
    factor, from_aligned = lerp_factor(1 + ALPHA)
    memory = threading.local()

    def stream(way: Way, block: int) -> None:
        if not hasattr(memory, "pieces"):
            memory.pieces = np.empty((2, sizes.STREAM_PIECE_BYTES), np.uint8)
        one, two = (piece.ctypes.data for piece in memory.pieces)
        record = (
            base.descriptor, aligned.descriptor, block, block, base.mapped.ctypes.data + block,
            aligned.mapped.ctypes.data + block, out.ctypes.data + block, min(_BLOCK, size - block) // 2, 0, block // 2,
            1, factor, from_aligned, False, True,
        )  # fmt: skip
        piece = (sizes.MAPPED_PIECE_BYTES if way.is_mapped else sizes.STREAM_PIECE_BYTES) // 2
        reading.stream(np.array([record], reading.BLOCK), one, two, piece, way.is_mapped, way.is_non_temporal)

    def measured(way: Way, threads: int) -> float:
        base.map()
        aligned.map()
        return in_threads(lambda block: stream(way, block), size, threads)

    for way in _WAYS:
        name = f"stream, {'mapped' if way.is_mapped else 'read'}{', past the cache' if way.is_non_temporal else ''}"
        yield name, partial(measured, way)


def measure(pair: Pair, rounds: int) -> dict[str, Any]:
    """Seconds of each part and of each way, and the limit: seconds of the fastest for all bytes of a side."""
    assert kernels.available("bf16.combine", "reading.stream"), kernels.reason()
    seconds: dict[str, list[float]] = {}
    with ExitStack() as stack:
        files = [
            max(weight_files(folder), key=lambda file: file.stat().st_size) for folder in (pair.base, pair.aligned)
        ]
        base, aligned = (Side(file, stack) for file in files)
        out = np.zeros(base.size, np.uint8)
        out[:: mmap.PAGESIZE] = 1
        runs = {
            f"{name}, threads: {threads}": (run, threads)
            for name, run in (*_parts(base, out), *_streams(base, aligned, out))
            for threads in _THREADS
        }
        for name in turns(list(runs), rounds):
            warm(pair.files)
            run, threads = runs[name]
            seconds.setdefault(name, []).append(run(threads))
        share = pair.side_bytes / min(base.size, aligned.size)
    figures = {name: spread(found) for name, found in seconds.items()}
    fastest = min((name for name in figures if name.startswith("stream")), key=lambda name: figures[name]["median"])
    limit = share * figures[fastest]["median"]
    return {"seconds": figures, "bytes": base.size, "limit": {"way": fastest, "seconds": limit}}


def show(figures: dict[str, Any]) -> str:
    """A table."""
    rows = [
        (name, shown(found, 3), f"{figures['bytes'] / found['median'] / 1e9:.1f}")
        for name, found in figures["seconds"].items()
    ]
    limit = figures["limit"]
    rows.append((f"limit: {limit['way']}", f"{limit['seconds']:.3f}", ""))
    return table(("part", "seconds", "GB/s of one side"), rows)


def main() -> None:
    """Measure one size, print the figures, add them to the result file."""
    options = parser(__doc__, size="1.1b", rounds=5).parse_args()
    with pair_of(options.size, options.work, options.keep) as pair:
        figures = measure(pair, options.rounds)
    save("roofline", options.size, figures, options.results)
    print(show(figures))


if __name__ == "__main__":
    main()
