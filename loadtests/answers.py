"""How long does the command take to answer what it need not load anything for: help, and mistakes?

The cases of ``tests/test_cli_speed.py``, which holds that nothing heavy is imported for them; a process each, in turn.

    python -m loadtests.answers [--rounds 9]
"""

from __future__ import annotations

import time
from typing import Any

from loadtests.results import parser, save, shown, spread, table, turns
from tests.server import run_command
from tests.test_cli_speed import QUICK

BAR_SECONDS = 0.5


def measure(rounds: int) -> dict[str, Any]:
    """Seconds by case; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in QUICK}
    for index, name in enumerate(turns(list(QUICK), rounds + 1)):
        arguments, code = QUICK[name]
        started = time.perf_counter()
        result = run_command(*arguments)
        if result.returncode != code:
            raise RuntimeError(f"{name}: exit code {result.returncode}, expected {code}: {result.stderr}")
        if index >= len(QUICK):
            seconds[name].append(time.perf_counter() - started)
    return {"seconds": {name: spread(found) for name, found in seconds.items()}}


def main() -> None:
    """Measure, print the figures, keep them."""
    options = parser(__doc__, size="demo", rounds=9).parse_args()
    figures = measure(options.rounds)
    save("answers", options.size, figures, options.results)
    rows = [[name, shown(found), f"at most {BAR_SECONDS}"] for name, found in figures["seconds"].items()]
    print(table(["call", "seconds", "bar"], rows))


if __name__ == "__main__":
    main()
