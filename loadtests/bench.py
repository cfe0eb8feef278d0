"""All load tests, one after the other, and their figures against the bars: `make bench`.

python -m loadtests.bench             about an hour, 30 GB of disk, of which nothing but .bench/mergekit-venv stays
python -m loadtests.bench --quick     every script on the smallest pair with few rounds, to see that all of them run;
                                      its figures go to .bench/quick and say little
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from loadtests.pairs import pair_of
from loadtests.plot import draw
from loadtests.results import RESULTS, WORK
from loadtests.summary import MAIN_SIZE, write

# For each size what is run on it, while its pair is there.
_Steps = dict[str, list[list[str]]]
_FULL: _Steps = {
    "demo": [
        ["load_time", "--rounds", "15", "--cold-rounds", "5"],
        ["delta_load", "--rounds", "9", "--cold-rounds", "3"],
        ["fresh_load", "--rounds", "5"],
        ["serving", "--rounds", "10"],
        ["phases", "--rounds", "3"],
        ["answers", "--rounds", "9"],
    ],
    "0.5b": [["load_time", "--rounds", "11", "--cold-rounds", "5"], ["fresh_load", "--rounds", "3"], ["ranks"]],
    "1.1b": [
        ["load_time", "--rounds", "11", "--cold-rounds", "5"],
        ["delta_load", "--rounds", "9", "--cold-rounds", "3"],
        ["check_cost", "--rounds", "9"],
        ["fresh_load", "--rounds", "5"],
        ["ranks"],
        ["routes", "--rounds", "3", "--alphas", "8"],
        ["phases", "--rounds", "2"],
    ],
    "3b": [["load_time", "--rounds", "7", "--cold-rounds", "3"], ["fresh_load", "--rounds", "2"]],
}
_QUICK: _Steps = {
    "demo": [
        ["load_time", "--rounds", "3", "--cold-rounds", "2"],
        ["delta_load", "--rounds", "2", "--cold-rounds", "1"],
        ["fresh_load", "--rounds", "1"],
        ["routes", "--rounds", "1", "--alphas", "1"],
        ["serving", "--rounds", "2", "--prompts", "8"],
        ["phases", "--rounds", "1"],
        ["answers", "--rounds", "1"],
    ],
    "0.1b": [["load_time", "--rounds", "3", "--cold-rounds", "2"], ["check_cost", "--rounds", "3"], ["ranks"]],
}


def run(steps: _Steps, work: Path, results: Path) -> list[str]:
    """Run every script in a process of its own; returns those that failed."""
    failed = []
    for size, scripts in steps.items():
        with pair_of(size, work):
            for name, *arguments in scripts:
                title = f"{name} {size}"
                print(f"\n## {title}", flush=True)
                started = time.monotonic()
                places = ["--work", str(work), "--results", str(results)]
                command = [sys.executable, "-m", f"loadtests.{name}", "--size", size, *arguments, *places]
                if subprocess.run(command, check=False).returncode:
                    failed.append(title)
                print(f"({time.monotonic() - started:.0f} s)", flush=True)
    return failed


def main() -> None:
    """Run all, print one table, draw the plot; exits 1 if a script failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smallest pairs and few rounds: do all scripts run?")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument(
        "--results", type=Path, help=f"folder of the result files; default {RESULTS.name}, or quick's own"
    )
    options = parser.parse_args()
    results = options.results or (options.work / "quick" if options.quick else RESULTS)
    failed = run(_QUICK if options.quick else _FULL, options.work, results)
    print(f"\n{write(results, 'demo' if options.quick else MAIN_SIZE)}")
    print(f"wrote {results / 'summary.md'} and {draw(results, MAIN_SIZE)}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
