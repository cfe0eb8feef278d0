"""Two ranks of vLLM at once: is each rank's part the same by expo as by plain vLLM, and how much does it read?

Each rank has a card of its own where there are two; on one card they share it, and say what they must by gloo.

    python -m loadtests.device_check.two_ranks RANK PARALLEL DEVICE QUICK WORK STORE     is one rank; the case starts it
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loadtests.device_check import vllm_loads
from loadtests.device_check.setting import Setting
from loadtests.device_check.vllm_models import models
from loadtests.device_check.vllm_worker import Rank, prepare

RANKS = 2
_MARK = "rank: "
_SECONDS = 400
_KINDS = {
    "tensor": vllm_loads.Kind("llama", {"tensor_parallel_size": RANKS}),
    "expert": vllm_loads.Kind("mixtral", {"tensor_parallel_size": RANKS, "enable_expert_parallel": True}),
}


def run(setting: Setting, parallel: str) -> dict[str, Any]:
    """Both ranks as processes; each compares its own part."""
    prepare(setting)
    made = models(setting, _KINDS[parallel].family)  # before the ranks race for it
    both = sum(file.stat().st_size for side in (made.base, made.aligned) for file in side.glob("*.safetensors"))
    ranks = _run_ranks(setting, parallel)
    wrong = [f"rank {index}: {sentence}" for index, rank in enumerate(ranks) for sentence in rank.pop("wrong")]
    shares = [round(sum(rank["expo"]["read_bytes"].values()) / both, 4) for rank in ranks]
    cards = torch.cuda.device_count() if setting.is_cuda else 0
    return {
        "cards": min(cards, RANKS),
        "pair_bytes": both,
        "share_of_the_pair_read": dict(enumerate(shares)),
        "ranks": dict(enumerate(ranks)),
        "wrong": wrong,
    }


def _run_ranks(setting: Setting, parallel: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="expo-two-ranks-") as folder:
        options = [parallel, setting.device.type, str(int(setting.quick)), str(setting.work), f"{folder}/store"]
        command = [sys.executable, "-m", "loadtests.device_check.two_ranks"]
        environment = {**os.environ, "VLLM_DIST_IDENT": Path(folder).name}  # vLLM's ranks on a CPU meet by it
        processes = [
            subprocess.Popen([*command, str(number), *options], stdout=subprocess.PIPE, text=True, env=environment)
            for number in range(RANKS)
        ]
        try:
            outputs = [process.communicate(timeout=_SECONDS)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    return [_answer(number, output) for number, output in enumerate(outputs)]


def _answer(number: int, output: str) -> dict[str, Any]:
    for line in output.splitlines():
        if line.startswith(_MARK):
            answer: dict[str, Any] = json.loads(line.removeprefix(_MARK))
            return answer
    raise RuntimeError(f"rank {number} gave no answer: {output[-500:]}")


def _rank(setting: Setting, parallel: str, rank: Rank) -> dict[str, Any]:
    """Plain, then expo, in this rank's process."""
    prepare(setting)
    kind = _KINDS[parallel]
    made = models(setting, kind.family)
    found = {way: vllm_loads.load(setting, kind, made, way, rank=rank, keeps=True) for way in ("plain", "expo")}
    compared = vllm_loads.compare(setting, found["plain"][1], found["expo"][1])
    return {**compared, "expo": found["expo"][0]}


def main() -> None:
    """Be one rank."""
    number, parallel, device, quick, work, store = sys.argv[1:]
    setting = Setting(torch.device(device), bool(int(quick)), Path(work))
    rank = Rank(int(number), RANKS, Path(store))
    if setting.is_cuda and torch.cuda.device_count() >= RANKS:
        setting = replace(setting, device=torch.device("cuda", rank.number))
    print(f"\n{_MARK}{json.dumps(_rank(setting, parallel, rank))}", flush=True)


if __name__ == "__main__":
    main()
