"""One case in a process of its own; its last line is what came of it, as JSON.

    python -m loadtests.device_check.case bits-pair-nearest [--device cuda] [--quick] [--work DIR] [--plant]

``--plant`` falsifies a result on purpose: a case that does not find it has no teeth.
"""

from __future__ import annotations

import argparse
import time
import traceback
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from loadtests.device_check.cases import CASES, Case
from loadtests.device_check.outcome import Outcome, Skipped, judged


def perform(case: Case, device: str, quick: bool, work: Path, plants: bool = False) -> Outcome:
    """Do the case in this process; whatever goes wrong is its outcome."""
    started = time.perf_counter()
    try:
        outcome = _performed(case, device, quick, work, plants)
    except Skipped as skip:
        outcome = Outcome(case.name, "skipped", str(skip))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this case's answer
        traceback.print_exc()
        outcome = Outcome(case.name, "failed", f"{type(error).__name__}: {error}")
    return replace(outcome, seconds=round(time.perf_counter() - started, 3))


def _performed(case: Case, device: str, quick: bool, work: Path, plants: bool) -> Outcome:
    try:
        import torch
    except ImportError as error:
        raise Skipped(f"torch cannot be imported: {error}") from None
    from loadtests.device_check.setting import Setting

    if device == "cuda" and not torch.cuda.is_available():
        raise Skipped("torch sees no GPU; --device cpu checks the command itself")
    chosen = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
    module = import_module(f"loadtests.device_check.{case.module}")
    return judged(case.name, module.run(Setting(chosen, quick, work, plants), **case.options))


def main() -> None:
    """Do one case and print its outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES, metavar="CASE", help=f"one of {', '.join(CASES)}")
    add_options(parser)
    parser.add_argument("--plant", action="store_true", help="falsify a result: the case must find it")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    outcome = perform(CASES[options.case], options.device, options.quick, options.work, options.plant)
    print(outcome.line(), flush=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that the whole command shares with one case."""
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu checks the command, by the host's way of loading"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes and one round: does everything run?")
    parser.add_argument("--work", type=Path, default=Path(".bench/device_check"), help="folder for checkpoints")


if __name__ == "__main__":
    main()
