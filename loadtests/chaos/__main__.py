"""Does expo-serve keep its promises under faults? A plan with a seed, against a real server under steady streams.

    python -m loadtests.chaos --seed 1 --minutes 5
    python -m loadtests.chaos --seed 1 --minutes 5 --list            what would happen
    python -m loadtests.chaos --only 'kill worker' --minutes 1       one fault

As root it runs in namespaces of its own for mounts and network; without root the faults that need them are reported as
not possible. SIGTERM ends a run early: no server stays, and the figures so far are kept. Exits 1 if a promise was
broken.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from loadtests.chaos import clock
from loadtests.chaos.faults import CATALOGUE
from loadtests.chaos.plan import Fault, Life, plan
from loadtests.chaos.report import as_figures, line, summary
from loadtests.chaos.run import Result, Run
from loadtests.chaos.surroundings import enter_namespaces
from loadtests.machine import OthersAtWork
from loadtests.results import RESULTS, WORK, save


class _BrokenOff(BaseException):
    """Somebody wants no more of the run."""


def _break_off(number: int, frame: FrameType | None) -> None:
    raise _BrokenOff


def main() -> int:
    """Run the plan, print the table, keep the figures; returns 1 if a promise was broken."""
    options = _parser().parse_args()
    lives = plan(options.seed, options.minutes, options.only)[options.first - 1 :]
    if options.list:
        print(shown(lives))
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    if any("clock" in life.needs for life in lives):
        clock.install(options.work)
    missing = enter_namespaces("loadtests.chaos")
    if missing:
        print(f"without namespaces of its own: {missing}", flush=True)
    signal.signal(signal.SIGTERM, _break_off)
    work = options.work.absolute() / f"chaos-{os.getpid()}"
    work.mkdir(parents=True)
    began = time.monotonic()
    run, is_complete = Run(work, options.seed, _tell), False
    with OthersAtWork() as others, suppress(_BrokenOff):
        run.carry_out(lives, options.first)
        is_complete = True
    figures = {
        "seed": options.seed,
        "is_complete": is_complete,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "busy_cores_of_others": round(others.cores, 2),
        **as_figures(run.results),
    }
    save("chaos", options.key, figures, options.results)
    print(f"\n{summary(figures)}")
    if (work / "logs").exists():
        print(f"\nLogs of the servers that broke a promise: {work / 'logs'}")
        return 1
    work.rmdir()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="decides what happens and when (default 1)")
    parser.add_argument("--minutes", type=float, default=5, help="about how long (default 5)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="FAULT", choices=CATALOGUE, help="can be repeated"
    )
    parser.add_argument("--first", type=int, default=1, metavar="N", help="begin with this life of the plan")
    parser.add_argument("--list", action="store_true", help="print the plan and do nothing")
    parser.add_argument("--key", default="demo", help="under which the figures are kept (default demo)")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for what servers write")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    return parser


def shown(lives: list[Life]) -> str:
    """Return a plan as text."""
    return "\n".join(f"{number}: {', '.join(map(_shown, life.faults))}" for number, life in enumerate(lives, 1))


def _shown(fault: Fault) -> str:
    return f"{fault.kind} (after {fault.delay:g} s, for {fault.holds:g} s)"


def _tell(result: Result) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line(result)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
