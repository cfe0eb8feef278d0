"""Fuzzes what expo-serve reads before it starts an engine: headers, configs, indexes, adapters, deltas, flags.

python -m loadtests.fuzz.formats --minutes 60 --seed 1

Every format gets the same share of the time, half of it for changes of real files and half for files made from
strategies; with atheris installed both are guided by coverage. A file breaks the promise (``loadtests.fuzz.judge``) if
the commands do anything but plan it, or refuse it in lines that can be read. Such files stay in the work folder, and
the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from loadtests.fuzz import guide
from loadtests.fuzz.deployments import formats
from loadtests.fuzz.shapes import SHAPES
from loadtests.fuzz.slices import CURRENT, FIGURES, FINDS
from loadtests.results import RESULTS, WORK, save

_STALLED_SECONDS = 60.0
WAYS = ("changed", "made")


def tasks(only: list[str]) -> list[tuple[str, str]]:
    """Return each format in each way that there is for it."""
    return [
        (name, way) for way in WAYS for name in formats() if way != "made" or name in SHAPES if name in only or not only
    ]


def run_slice(name: str, way: str, seconds: float, seed: int, work: Path) -> dict[str, Any]:
    """Fuzz one format in a process of its own; returns its figures. What ended or stalled the process is a find."""
    work = work / name.replace(" ", "-")
    work.mkdir(parents=True, exist_ok=True)
    (work / FIGURES).unlink(missing_ok=True)
    arguments = {"format": name, "way": way, "seconds": seconds, "seed": seed, "work": work}
    command = [sys.executable, "-m", "loadtests.fuzz.slices", *(f"--{key}={value}" for key, value in arguments.items())]
    with (work / f"{way}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            problem = _wait(process, work)
        finally:
            process.kill()
            process.wait()
    figures: dict[str, Any] = json.loads((work / FIGURES).read_text()) if (work / FIGURES).exists() else {"finds": {}}
    if problem:
        content = (work / CURRENT).read_bytes() if (work / CURRENT).exists() else b""
        (work / FINDS).mkdir(exist_ok=True)
        file = f"{name.replace(' ', '-')}-{way}-process"
        (work / FINDS / file).write_bytes(content)
        end = (work / f"{way}.log").read_text(errors="replace")[-300:]
        figures["finds"][problem] = {"message": end, "file": file}
    return figures


def _wait(process: subprocess.Popen[bytes], work: Path) -> str | None:
    """Wait for the end; returns what was wrong with it."""
    started = time.time()
    while process.poll() is None:
        time.sleep(0.5)
        noted = max([file.stat().st_mtime for file in (work / FIGURES, work / CURRENT) if file.exists()] + [started])
        if time.time() - noted > _STALLED_SECONDS:
            return "the process stalled"
    return f"the process ended with {process.returncode}" if process.returncode else None


class Totals:
    """The figures of a run, summed over its slices."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._started = time.monotonic()
        self._outcomes: dict[str, dict[str, Counter[str]]] = {}
        self._refusals: dict[str, Counter[str]] = {}
        self._slowest: dict[str, float] = {}
        self.finds: dict[str, dict[str, str]] = {}

    def add(self, name: str, way: str, figures: dict[str, Any]) -> None:
        """Add one slice."""
        self._outcomes.setdefault(name, {}).setdefault(way, Counter()).update(figures.get("outcomes", {}))
        self._refusals.setdefault(name, Counter()).update(figures.get("refusals", {}))
        self._slowest[name] = max(self._slowest.get(name, 0.0), figures.get("slowest_cpu_seconds", 0.0))
        for place, find in figures["finds"].items():
            self.finds.setdefault(f"{name}: {place}", find)

    def figures(self) -> dict[str, Any]:
        """Return what is kept as the result."""
        executions = {name: sum(sum(one.values()) for one in ways.values()) for name, ways in self._outcomes.items()}
        return {
            "seed": self._seed,
            "engine": guide.engine(),
            "minutes": round((time.monotonic() - self._started) / 60, 2),
            "executions": {"total": sum(executions.values()), **executions},
            "outcomes": {name: {way: dict(one) for way, one in ways.items()} for name, ways in self._outcomes.items()},
            "distinct_refusals": {name: len(one) for name, one in self._refusals.items()},
            "slowest_cpu_seconds": self._slowest,
            "finds": self.finds,
        }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="default 60")
    parser.add_argument("--seed", type=int, default=1, help="default 1")
    parser.add_argument(
        "--only", nargs="*", default=[], choices=sorted(formats()), metavar="FORMAT", help="some formats"
    )
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the files; those that broke something stay")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    there = tasks(options.only)
    totals = Totals(options.seed)
    for name, way in there:
        seconds = options.minutes * 60 / len(there)
        figures = run_slice(name, way, seconds, options.seed, options.work / "fuzz_formats")
        totals.add(name, way, figures)
        print(name, way, figures.get("outcomes"), *figures["finds"], sep="\n  ", flush=True)
        save("fuzz_formats", f"seed {options.seed}", totals.figures(), options.results)
    sys.exit(1 if totals.finds else 0)


if __name__ == "__main__":
    main()
