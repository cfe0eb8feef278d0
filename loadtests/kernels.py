"""How much faster are the compiled loops than torch and NumPy, and what does compiling them cost a start?

The loops: each against what its caller does without it, on operands that are in the cache, in turn. Times are those of
the thread's own processor time, which others on the machine change least; ratios are taken round by round.

Compiling: by format of the delta, in a fresh process with an empty cache (the first start of a node) and in the next
one (later starts), numba's import included; processor time too. A load does this in a thread of its own while the model
is built.

    python -m loadtests.kernels [--rounds 101]
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expo_serve import kernels
from expo_serve.kernels import bf16, low_rank, reading, sparse
from expo_serve.load import blocks, sizes
from expo_serve.load.dtypes import signed_bits, uint16_bits
from expo_serve.plan.packed_format import checksum
from loadtests.results import ALPHA, parser, ratio_spread, save, shown, spread, table, turns

LOOPS: tuple[kernels.Loop, ...] = (
    "bf16.combine", "reading.stream", "reading.gather", "reading.fetch", "sparse.apply16", "sparse.extrapolate",
    "low_rank.product", "low_rank.stream",
)  # fmt: skip
FORMATS = {"pair": None, "packed": "packed", "lora": "lora"}
_WEIGHT = 1 + ALPHA
_STEP_SECONDS = 0.002
"""At least, between two looks at the clock."""
_COMPILE = """
import json, time
import torch
from expo_serve.load.fill import compile_kernels
started = time.process_time()
reason = compile_kernels({format!r})
print(json.dumps({{"seconds": time.process_time() - started, "reason": reason}}))
"""
Ways = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """One loop on one size of operands, and other ways to the same result."""

    name: str
    ways: Ways
    """``compiled`` and ``plain``, and whatever else is compared."""


class Operands:
    """Random operands of the loops, some of them in files of ``folder``.

    Args:
        folder: of the files.
        values: of each operand.
    """

    def __init__(self, folder: Path, values: int = 1 << 20) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.base = self.random(values).bfloat16()
        self.aligned = (self.base.float() + 0.01 * self.random(values)).bfloat16()
        self.out = torch.empty_like(self.base)
        self.files = [self._write(folder / name, side) for name, side in (("b", self.base), ("a", self.aligned))]
        self.memory = [np.empty(sizes.STREAM_PIECE_BYTES // 2, np.uint16) for _ in range(2)]

    def random(self, *shape: int) -> torch.Tensor:
        """Normal numbers."""
        return torch.randn(*shape, generator=self.generator)

    def changed(self, share: float) -> torch.Tensor:
        """The base with a share of its values changed, one in a hundred of them by much."""
        some = torch.rand(self.base.shape, generator=self.generator)
        spread = torch.where(some < share / 100, 0.5, 0.004) * self.random(*self.base.shape)
        return torch.where(some < share, (self.base.float() * (1 + spread)).bfloat16(), self.base)

    def _write(self, file: Path, values: torch.Tensor) -> int:
        file.write_bytes(uint16_bits(values).tobytes())
        return os.open(file, os.O_RDONLY)


def cases(operands: Operands) -> Iterator[Case]:
    """All loops."""
    yield from (_combine(operands, count) for count in (1 << 17, 1 << 19, 1 << 20))
    yield _stream(operands)
    yield from (_gather(operands, size) for size in (512, 4096))
    yield _fetch(operands)
    for share in (0.002, 0.05, 0.15, 0.45):
        yield from _sparse(operands, share)
    for rank in (64, 16, 8):
        yield from _low_rank(operands, rank)


def _combine(operands: Operands, count: int) -> Case:
    base, aligned, out = (side[:count] for side in (operands.base, operands.aligned, operands.out))
    bits, step = (uint16_bits(base), uint16_bits(aligned), uint16_bits(out)), bf16.lerp_factor(_WEIGHT)
    return Case(
        f"combine, {2 * count >> 10} KiB of result",
        {
            "compiled": lambda: bf16.combine(*bits, *step, False, bits[0][:0]),
            "plain": lambda: _lerp_and_look(base, aligned, out),
        },
    )


def _lerp_and_look(base: torch.Tensor, aligned: torch.Tensor, out: torch.Tensor) -> object:
    torch.lerp(base, aligned, _WEIGHT, out=out)
    return out.sum().item()


def _stream(operands: Operands) -> Case:
    out, step = uint16_bits(operands.out), bf16.lerp_factor(_WEIGHT)

    def plain() -> None:
        count = operands.memory[0].size
        sides = [torch.from_numpy(memory.view(np.int16)).view(torch.bfloat16) for memory in operands.memory]
        for start in range(0, operands.out.numel(), count):
            for file, memory in zip(operands.files, operands.memory, strict=True):
                os.preadv(file, [memory.data], 2 * start)
            _lerp_and_look(sides[0], sides[1], operands.out[start : start + count])

    maps = [mmap.mmap(file, 0, prot=mmap.PROT_READ) for file in operands.files]
    table = np.zeros(1, reading.BLOCK)
    table["base_file"], table["other_file"] = operands.files
    table["base"], table["other"] = (np.frombuffer(each, np.uint8).ctypes.data for each in maps)
    table["out"], table["size"], table["factor"], table["from_other"] = out.ctypes.data, out.size, *step
    one, two = (each.ctypes.data for each in operands.memory)

    def compiled(is_mapped: bool, is_non_temporal: bool, is_dithered: bool) -> Callable[[], None]:
        def call() -> None:
            table["is_dithered"] = is_dithered
            reading.stream(table, one, two, operands.memory[0].size, is_mapped, is_non_temporal)
            assert maps

        return call

    return Case(
        f"stream, {operands.out.nbytes >> 20} MiB of result",
        {
            "compiled": compiled(is_mapped=False, is_non_temporal=False, is_dithered=False),
            "dithered": compiled(is_mapped=False, is_non_temporal=False, is_dithered=True),
            "mapped": compiled(is_mapped=True, is_non_temporal=False, is_dithered=False),
            "mapped, past the cache": compiled(is_mapped=True, is_non_temporal=True, is_dithered=False),
            "plain": plain,
        },
    )


def _gather(operands: Operands, size: int) -> Case:
    offsets = np.arange(0, operands.base.nbytes, 2 * size)[:1024]
    memory, file = np.empty(size * offsets.size, np.uint8), operands.files[0]

    def plain() -> None:
        for index, offset in enumerate(offsets):
            os.preadv(file, [memory[index * size : (index + 1) * size].data], offset)

    name = f"gather, {offsets.size} extents of {size} bytes"
    return Case(name, {"compiled": lambda: reading.gather(file, memory, offsets), "plain": plain})


def _fetch(operands: Operands) -> Case:
    file, memory = operands.files[0], np.empty(operands.base.nbytes, np.uint8)
    expected = checksum(uint16_bits(operands.base).tobytes())

    def plain() -> None:
        os.preadv(file, [memory.data], 0)
        assert checksum(memory.data) == expected

    def compiled() -> None:
        assert reading.fetch(file, 0, memory, sizes.FETCH_PIECE_BYTES, expected)

    return Case(f"fetch, {memory.size >> 20} MiB", {"compiled": compiled, "plain": plain})


def _sparse(operands: Operands, share: float) -> Iterator[Case]:
    """The loops take base anew each time, which all ways do alike."""
    aligned, step = operands.changed(share), bf16.lerp_factor(_WEIGHT)
    coded = blocks._changes(signed_bits(aligned), signed_bits(operands.base))
    found = blocks.decompressed(coded, aligned.numel(), 2)
    parts, values = (found.gaps, found.small, found.large), torch.empty_like(aligned)
    bits = signed_bits(values)
    yield Case(
        f"apply, {share:.1%} of {aligned.numel() >> 20} Mi values",
        {
            "compiled": lambda: sparse.apply16(*parts, signed_bits(values.copy_(operands.base))),
            "plain": lambda: blocks._apply_plain(*parts, signed_bits(values.copy_(operands.base))),
        },
    )

    def plain() -> None:
        blocks._apply_plain(*parts, signed_bits(values.copy_(operands.base)))
        _lerp_and_look(operands.base, values, operands.out)

    def compiled() -> None:
        values.copy_(operands.base)
        assert sparse.extrapolate(*parts, bits, *step, False, 0, 0)

    yield Case(f"extrapolate, {share:.1%} of {aligned.numel() >> 20} Mi values", {"compiled": compiled, "plain": plain})


def _low_rank(operands: Operands, rank: int, rows: int = 128, columns: int = 2048) -> Iterator[Case]:
    left, right = operands.random(rows, rank), 0.01 * operands.random(rank, columns)
    one, two, file = left.numpy(), right.numpy(), operands.files[0]
    values, product = operands.out[: rows * columns].view(rows, columns), torch.empty(rows, columns)
    bits, out = uint16_bits(values).reshape(rows, columns), product.numpy()
    step = max(1, sizes.LOW_RANK_PIECE_BYTES // (2 * columns))

    def plain() -> None:
        os.preadv(file, [bits.data], 0)
        torch.mm(left, right, out=product)
        torch.add(values.float(), product, alpha=0.5 * _WEIGHT, out=product)
        values.copy_(product)
        values.sum().item()

    yield Case(
        f"low-rank product, rank {rank}, {rows} by {columns}",
        {
            "compiled": lambda: low_rank.product(one, two, 0, out, 0.5),
            "plain": lambda: torch.mm(left, right, out=product),
        },
    )
    yield Case(
        f"low-rank stream, rank {rank}, {rows} by {columns}",
        {"compiled": lambda: low_rank.stream(file, 0, one, two, bits, 0.5, _WEIGHT, step, False, 0, 0), "plain": plain},
    )


def compare(case: Case, rounds: int) -> dict[str, Any]:
    """Seconds of each way, in turn, and the ratio of all to the last one."""
    names = list(case.ways)
    for way in case.ways.values():
        way()
    started = time.thread_time()
    case.ways[names[0]]()
    inner = max(1, round(_STEP_SECONDS / max(1e-6, time.thread_time() - started)))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in turns(names, rounds):
        started = time.thread_time()
        for _ in range(inner):
            case.ways[name]()
        seconds[name].append((time.thread_time() - started) / inner)
    ratios = {name: ratio_spread(seconds[name], seconds[names[-1]]) for name in names[:-1]}
    return {"seconds": {name: _percentiles(found) for name, found in seconds.items()},
            "ratio": {name: _percentiles(found["all"]) for name, found in ratios.items()}}  # fmt: skip


def _percentiles(values: list[float]) -> dict[str, Any]:
    """Median, 10th and 90th percentile in place of the extremes, which say little of many short turns."""
    found = spread(values)
    low, high = np.percentile(values, [10, 90])
    return {"median": found["median"], "min": float(low), "max": float(high)}


def compile_seconds(rounds: int) -> dict[str, Any]:
    """What compiling costs, by format of the delta: with an empty cache, and from the cache."""
    found: dict[str, dict[str, list[float]]] = {name: {"first start": [], "later start": []} for name in FORMATS}
    for _ in range(rounds):
        for name, delta in FORMATS.items():
            with tempfile.TemporaryDirectory() as folder:
                for start in found[name].values():
                    start.append(_compile(delta, folder))
    return {name: {start: spread(seconds) for start, seconds in starts.items()} for name, starts in found.items()}


def _compile(delta: str | None, cache: str) -> float:
    code = _COMPILE.format(format=delta)
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    assert not found["reason"], found["reason"]
    return float(found["seconds"])


def show_compile_seconds(figures: dict[str, Any]) -> str:
    """A table."""
    rows = [(name, *(shown(starts[start]) for start in starts)) for name, starts in figures.items()]
    return table(("loops of", "first start, s", "later start, s"), rows)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch with one thread, as the loops have one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure(rounds: int) -> dict[str, Any]:
    """All loops against the plain way."""
    assert kernels.available(*LOOPS), kernels.reason()
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        return {case.name: compare(case, rounds) for case in cases(Operands(Path(folder)))}


def show(figures: dict[str, Any]) -> str:
    """A table: microseconds of both, and the ratio of their times."""
    rows = [
        (name, shown(found["seconds"]["compiled"], 0, 1e-6), shown(found["seconds"]["plain"], 0, 1e-6),
         shown(found["ratio"]["compiled"]))
        for name, found in figures.items()
    ]  # fmt: skip
    return table(("loop", "compiled, us", "torch or NumPy, us", "ratio of times"), rows)


def main() -> None:
    """Measure, print the figures, keep them."""
    options = parser(__doc__, size="any", rounds=101).parse_args()
    loops = measure(options.rounds)
    compiling = compile_seconds(3)
    save("kernels", "against torch", {"loops": loops, "compiling": compiling}, options.results)
    print(show(loops), show_compile_seconds(compiling), sep="\n\n")


if __name__ == "__main__":
    main()
