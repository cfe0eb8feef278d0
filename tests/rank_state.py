"""Tensor- or pipeline-parallel ranks, each in a process of its own, without an engine: what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.children import Child, asked, reply
from tests.inprocess import hash_state, vllm_model


def run_ranks(loads: list[dict[str, Any]], store: Path, ranks: int = 2) -> list[list[dict[str, Any]]]:
    """Run every rank at once.

    Args:
        loads: arguments of :func:`tests.inprocess.vllm_model`; tensor-parallel unless they say otherwise.
        store: a file by which the ranks find each other.
        ranks: how many.

    Returns:
        For each rank, and in it for each load: ``hashes`` of every parameter's bits, also as they were loaded, and of
        our report ``read_bytes`` by side, ``tensors`` by kind, and ``rank``.

    Raises:
        AssertionError: a rank failed.
    """
    request = {"store": str(store), "loads": [{"tensor_parallel_size": ranks, **load} for load in loads]}
    children = [Child(__name__, {**request, "rank": rank}, VLLM_DIST_IDENT=store.parent.name) for rank in range(ranks)]
    try:
        return [child.answer() for child in children]
    finally:
        for child in children:
            child.end()


def _main(rank: int, store: str, loads: list[dict[str, Any]]) -> None:
    answers = []
    for load in loads:
        with vllm_model(rank=rank, store=Path(store), **load) as model:
            report = getattr(model, "expo_load_report", None)
            said = report.model_dump(include={"read_bytes", "tensors", "rank"}) if report else {}
            answers.append({"hashes": hash_state(model), **said})
    reply(answers)


if __name__ == "__main__":
    _main(**asked())
