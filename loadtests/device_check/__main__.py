"""Checks and measures the load onto a GPU, in three stages; every case runs in a process of its own.

1  torch alone: bits against the CPU's, order of streams, memory pools, errors, rates against the link and other loaders
2  real vLLM: plain from a merged checkpoint against expo from the pair, bits before and after vLLM's processing,
   seconds in turn, peak memory, online quantisation, sleep mode, offload, tokens
3  two ranks of vLLM, tensor and expert parallel: bits and bytes

    python -m loadtests.device_check                      all of it, on the first GPU
    python -m loadtests.device_check --stage 1 --quick    some minutes: does everything run?
    python -m loadtests.device_check --only rates         the cases whose names begin so
    python -m loadtests.device_check --device cpu         without a GPU: a check of the command itself, not a figure

Figures are printed as they come and kept in device_check.json. A case that crashes, runs too long or cannot be done
here is a result with its reason. The exit code is 1 if a case was wrong, failed, crashed or ran too long.
docs/gpu.md says what is needed on a bare machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from loadtests.device_check import report
from loadtests.device_check.cases import CASES, STAGES, Case, chosen
from loadtests.device_check.outcome import Outcome
from loadtests.device_check.running import run_case


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = argparse.ArgumentParser(
        prog="python -m loadtests.device_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--stage", type=int, choices=STAGES, nargs="+", action="extend", help="the stages to run; by default all"
    )
    made.add_argument("--only", nargs="+", action="extend", metavar="CASE", help="cases whose names begin so")
    made.add_argument("--list", action="store_true", help="print the names of the cases and end")
    made.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu checks the command, by the host's way of loading"
    )
    made.add_argument("--quick", action="store_true", help="small sizes and one round: does everything run?")
    made.add_argument(
        "--results", type=Path, default=Path(".bench/device_check/results"), help="folder of the result file"
    )
    made.add_argument("--key", help="under which the figures stand in the file; by default the device")
    made.add_argument("--work", type=Path, help="folder for checkpoints, some 20 GB; by default one that is removed")
    return made


def run(cases: list[Case], options: argparse.Namespace, work: Path) -> list[Outcome]:
    """Run the cases in their order; print and keep each outcome as it comes."""
    outcomes: list[Outcome] = []
    key = options.key or options.device
    facts = {"device": options.device, "quick": options.quick, "stages": sorted({case.stage for case in cases})}
    for case in cases:
        outcomes.append(run_case(case, options.device, options.quick, work))
        print(report.shown(outcomes[-1]), flush=True)
        report.keep(outcomes, key, options.results, facts)
    return outcomes


@contextmanager
def _workplace(given: Path | None) -> Iterator[Path]:
    """The given folder, which is kept, or one that is removed in the end."""
    if given:
        given.mkdir(parents=True, exist_ok=True)
    with nullcontext(str(given)) if given else tempfile.TemporaryDirectory(prefix="expo-device-check-") as folder:
        yield Path(folder).resolve()


def main() -> None:
    """Run what was asked for; ends with 1 if something is wrong."""
    options = parser().parse_args()
    try:
        cases = chosen(options.stage, options.only)
    except ValueError as error:
        parser().error(str(error))
    if options.list:
        print("\n".join(f"{case.name}  (stage {case.stage}, {STAGES[case.stage]})" for case in cases))
        return
    if not cases:
        parser().error(f"no case of {', '.join(CASES)} is in these stages")
    with _workplace(options.work) as work:
        outcomes = run(cases, options, work)
    print(f"{report.summed(outcomes)}; kept in {options.results / report.FILE}.json")
    if any(outcome.is_bad for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
