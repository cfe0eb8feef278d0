"""How much of the pair does a tensor-parallel rank read?

Two ranks, each in a process of its own, without an engine: the bytes that each read, over those of both sides' files,
by expo's report and by what the kernel counted for the process (`rchar`; reads through a mapping do not count there).

    python -m loadtests.ranks [--size 0.5b]      the demo's 9 heads do not go into two ranks
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from loadtests.loading import CONTENDERS, empty_model, load_once
from loadtests.pairs import Pair, pair_of
from loadtests.results import parser, save, spread, table
from tests.server import ENGINE_ENV

RANKS = 2
_MARK = "load: "


def measure(pair: Pair) -> dict[str, Any]:
    """One load by all ranks at once."""
    loads = _run_ranks(pair)
    whole = sum(file.stat().st_size for file in pair.files)
    return {
        "pair_bytes": whole,
        "ranks": loads,
        "report_share": spread([sum(load["report_read_bytes"].values()) / whole for load in loads]),
        "rchar_share": spread([load["rchar_bytes"] / whole for load in loads]),
    }


def _run_ranks(pair: Pair) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="expo-ranks-") as folder:
        environment = {**ENGINE_ENV, "VLLM_DIST_IDENT": Path(folder).name}
        command = [sys.executable, "-m", "loadtests.ranks", "--child"]
        arguments = [str(pair.base), str(pair.aligned), str(Path(folder, "store"))]
        processes = [
            subprocess.Popen([*command, str(rank), *arguments], stdout=subprocess.PIPE, text=True, env=environment)
            for rank in range(RANKS)
        ]
        try:
            outputs = [process.communicate(timeout=300)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a rank failed: {outputs}")
    lines = [next(line for line in output.splitlines() if line.startswith(_MARK)) for output in outputs]
    return [json.loads(line.removeprefix(_MARK)) for line in lines]


def _child(rank: int, pair: Pair, store: Path) -> None:
    with empty_model(pair.aligned, rank=rank, store=store, tensor_parallel_size=RANKS) as (model, config):
        figures = load_once(model, config, CONTENDERS["expo"], pair)
    print(f"\n{_MARK}{json.dumps({'rank': rank, **figures})}", flush=True)


def show(size: str, figures: dict[str, Any]) -> str:
    """The figures of one size as a table."""
    whole = figures["pair_bytes"]
    rows = [
        (
            size,
            load["rank"],
            f"{sum(load['report_read_bytes'].values()) / whole:.3f}",
            f"{load['rchar_bytes'] / whole:.3f}",
        )
        for load in figures["ranks"]
    ]
    return table(("pair", "rank", "read / whole pair, by the report", "by /proc/self/io"), rows)


def main() -> None:
    """Measure one size, print the figures, add them to the result file."""
    if sys.argv[1:2] == ["--child"]:
        rank, base, aligned, store = sys.argv[2:]
        _child(int(rank), Pair("", Path(base), Path(aligned)), Path(store))
        return
    options = parser(__doc__, size="0.5b", rounds=1).parse_args()
    with pair_of(options.size, options.work, options.keep) as pair:
        figures = measure(pair)
    save("ranks", options.size, figures, options.results)
    print(show(options.size, figures))


if __name__ == "__main__":
    main()
