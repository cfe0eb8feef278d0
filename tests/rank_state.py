"""One tensor- or pipeline-parallel rank in a process of its own, without an engine: what it holds, loaded two ways.

``python -m tests.rank_state '{"rank": 0, "store": path, "loads": [{...}, ...]}'`` prints one JSON line: for
each of the loads (arguments of :func:`tests.inprocess.vllm_model`) the hash of every parameter's bits, as they
were loaded too, and what expo's report says: the bytes read by side, the tensors by kind, the rank.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.inprocess import vllm_model
from tests.offline import hash_state
from tests.server import ENGINE_ENV


def run_ranks(loads: list[dict[str, Any]], store: Path, ranks: int = 2) -> list[list[dict[str, Any]]]:
    """Run every rank at once; one list of answers for each.

    Args:
        loads: arguments of :func:`tests.inprocess.vllm_model`; tensor-parallel unless they say otherwise.
        store: a file by which the ranks find each other.
        ranks: how many.

    Raises:
        AssertionError: a rank failed.
    """
    environment = {**ENGINE_ENV, "VLLM_DIST_IDENT": store.parent.name}
    request = {"store": str(store), "loads": [{"tensor_parallel_size": ranks, **load} for load in loads]}
    command = [sys.executable, "-m", "tests.rank_state"]
    processes = [
        subprocess.Popen(
            [*command, json.dumps({**request, "rank": rank})], stdout=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, outputs
    return [json.loads(output.strip().splitlines()[-1]) for output in outputs]


def _main(request: dict[str, Any]) -> None:
    answers = []
    for load in request["loads"]:
        with vllm_model(rank=request["rank"], store=Path(request["store"]), **load) as model:
            report = getattr(model, "expo_load_report", None)
            said = report.model_dump(include={"read_bytes", "tensors", "rank"}) if report else {}
            answers.append({"hashes": hash_state(model), **said})
    print(flush=True)
    print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
