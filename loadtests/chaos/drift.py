"""What processes hold over time: sampled while a server serves, and whether it grows."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import psutil

_INTERVAL_SECONDS = 10.0
_PERMUTATIONS = 20_000
_LEAST_BLOCKS = 6
"""Orders of fewer values are so few that none is rare."""


@dataclass(frozen=True)
class Sample:
    """One look at a process.

    Args:
        at: CLOCK_MONOTONIC in seconds.
        pss_bytes: its proportional set size: pages that it shares count in parts.
        files: open files.
        threads: how many it has.
    """

    at: float
    pss_bytes: int
    files: int
    threads: int


class Sampler:
    """Looks at all processes of a server every ten seconds, while the block runs.

    Args:
        roles: gives the processes that live, by what they are.
    """

    def __init__(self, roles: Callable[[], Mapping[str, psutil.Process]]) -> None:
        self._roles = roles
        self._ends = threading.Event()
        self.samples: dict[str, list[Sample]] = defaultdict(list)

    def __enter__(self) -> Sampler:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ends.wait(_INTERVAL_SECONDS):
            for role, process in self._roles().items():
                with suppress(psutil.Error):
                    self.samples[role].append(look_at(process))


def look_at(process: psutil.Process) -> Sample:
    """Return what a process holds now."""
    pss = process.memory_full_info().pss
    return Sample(time.monotonic(), pss, process.num_fds(), process.num_threads())


def drift(samples: Sequence[Sample], blocks: Sequence[tuple[float, float]], seed: int = 0) -> dict[str, Any] | None:
    """Return how the memory of a process changes with time; None where too few blocks have samples.

    Samples that follow each other are alike, so a straight line through all of them looks surer than it is. What counts
    is one mean a block, and a block is a time in which all of the traffic's levels come once. The slope is that of the
    line through the means (least squares); ``p`` is the share of all orders of the means (a sample of them) whose slope
    is as large, either way.

    Args:
        samples: of one process.
        blocks: the first and the last moment of each.
        seed: of the orders.
    """
    inside = [[sample for sample in samples if begin <= sample.at <= end] for begin, end in blocks]
    filled = [block for block in inside if block]
    if len(filled) < _LEAST_BLOCKS:
        return None
    hours = np.array([np.mean([sample.at for sample in block]) for block in filled]) / 3600
    means = np.array([np.mean([sample.pss_bytes for sample in block]) for block in filled]) / 2**20
    slope, p = slope_and_p(hours - hours[0], means, seed)
    return {
        "mib_first": round(float(means[0]), 2),
        "mib_last": round(float(means[-1]), 2),
        "mib_per_hour": round(slope, 3),
        "p": round(p, 5),
        "is_significant": p < 0.01,
        "blocks": len(filled),
        "mib": [round(float(mean), 2) for mean in means],
        "open_files": [filled[0][-1].files, filled[-1][-1].files],
        "threads": [filled[0][-1].threads, filled[-1][-1].threads],
    }


def slope_and_p(times: np.ndarray[Any, Any], values: np.ndarray[Any, Any], seed: int) -> tuple[float, float]:
    """Return the slope of the line through values, and how often a random order of them has one as steep."""
    centred, values = times - times.mean(), values - values.mean()
    spread = float(centred @ centred)
    slope = float(centred @ values) / spread
    orders = np.random.default_rng(seed).permuted(np.tile(values, (_PERMUTATIONS, 1)), axis=1)
    slopes = orders @ centred / spread
    steep = int(np.count_nonzero(np.abs(slopes) >= abs(slope) * (1 - 1e-9)))
    return slope, (steep + 1) / (_PERMUTATIONS + 1)
