"""How long does a load onto GPUs take, and what bounds it? The pipeline itself on a clock of its own; needs no GPU.

The rates are those of data sheets and of measurements on CPUs, so the seconds are estimates. The pipeline is that of
expo_serve/load/stage.py; only time is simulated. `--check` runs it in real time, with reads, copies and kernels that
sleep as long as they take, and compares.

    python -m loadtests.device_model [--model 70B] [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Print the table, and keep the figures."""
    options = _parser().parse_args()
    from loadtests.device_model.tables import check, estimates  # torch takes a second to import
    from loadtests.results import save

    save("device_model", "estimates", estimates(options.model), options.results)
    if options.check:
        save("device_model", "check", check(), options.results)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        choices=("8B", "70B", "235B MoE", "671B MoE"),
        help="can be repeated; default all",
    )
    parser.add_argument("--check", action="store_true", help="compare with a run in real time, which takes a minute")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results", help="folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
