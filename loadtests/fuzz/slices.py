"""One slice of the fuzzing of files: one format, in one way, in a process of its own, which it may break.

``changed`` changes real files; ``made`` draws whole files from a strategy of hypothesis. Figures are written every
second, and each file before it is judged: what ends the process is found there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadtests.fuzz import guide

if TYPE_CHECKING:
    from loadtests.fuzz.deployments import Format
    from loadtests.fuzz.judge import Judge

FIGURES, CURRENT, FINDS = "figures.json", "current.bin", "finds"
_MEMORY_BYTES = 2 * 2**30
_MOST_FINDS = 200


class Slice:
    """Judges file after file and counts.

    Args:
        kind: the format.
        judge: judges what lies in its folder.
        folder: the deployments.
        work: where figures and finds go.
    """

    def __init__(self, kind: Format, judge: Judge, folder: Path, work: Path) -> None:
        self._kind, self._judge, self._folder, self._work = kind, judge, folder, work
        self._outcomes: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        self._finds: dict[str, dict[str, str]] = {}
        self._slowest = self._noted = 0.0

    def __call__(self, data: bytes) -> None:
        """Judge one file."""
        (self._work / CURRENT).write_bytes(data)
        self._kind.put(self._folder, data)
        started = time.process_time()
        outcome = self._judge(self._kind)
        self._slowest = max(self._slowest, time.process_time() - started)
        self._outcomes[outcome.kind] += 1
        if outcome.kind == "refused":
            self._refusals[outcome.place] += 1
        if outcome.kind == "wrong" and outcome.place not in self._finds and len(self._finds) < _MOST_FINDS:
            self._keep(outcome.place, outcome.message, data)
        if time.monotonic() - self._noted > 1:
            self.note()

    def _keep(self, place: str, message: str, data: bytes) -> None:
        name = f"{self._kind.name.replace(' ', '-')}-{hashlib.sha256(place.encode()).hexdigest()[:10]}"
        (self._work / FINDS).mkdir(exist_ok=True)
        (self._work / FINDS / name).write_bytes(data)
        self._finds[place] = {"message": message.replace(f"{self._folder}/", ""), "file": name}
        self.note()

    def note(self) -> None:
        """Write the figures."""
        self._noted = time.monotonic()
        figures = {
            "outcomes": dict(self._outcomes),
            "refusals": dict(self._refusals.most_common()),
            "slowest_cpu_seconds": round(self._slowest, 3),
            "finds": self._finds,
        }
        (self._work / FIGURES).write_text(json.dumps(figures))


def _limit_memory() -> None:
    """Make too large an allocation a MemoryError."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY_BYTES, size + _MEMORY_BYTES))


def _drawn(shape: Any, one: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """Return a function that draws a file of a shape from bytes and judges it."""
    from hypothesis import HealthCheck, given, settings

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(shape)
    def drawn(data: bytes) -> None:
        one(data)

    from_bytes: Callable[[bytes], None] = drawn.hypothesis.fuzz_one_input
    return from_bytes


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    flags: dict[str, Any] = {"format": str, "way": str, "seconds": float, "seed": int, "work": Path}
    for flag, read in flags.items():
        parser.add_argument(f"--{flag}", type=read, required=True)
    options = parser.parse_args()
    with guide.instrumented():
        from loadtests.fuzz import deployments
        from loadtests.fuzz.changes import CHANGES, change_json
        from loadtests.fuzz.judge import Judge
        from loadtests.fuzz.shapes import SHAPES
    work = options.work.resolve()
    folder = work / "deployments"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    deployments.build(folder)
    kind = deployments.formats()[options.format]
    one = Slice(kind, Judge(folder), folder, work)
    seeds = kind.seeds(folder)
    for seed in seeds:
        one(seed)  # all that a run imports is imported by now
    _limit_memory()
    sys.argv = sys.argv[:1]
    corpus = work / f"corpus-{options.way}"
    if options.way == "made":
        guide.fuzz(_drawn(SHAPES[kind.name], one), None, [], corpus, options.seconds, options.seed)
    else:
        guide.fuzz(one, CHANGES.get(kind.name, change_json), seeds, corpus, options.seconds, options.seed)
    one.note()


if __name__ == "__main__":
    main()
