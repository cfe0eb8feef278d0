"""Does expo-serve stay as it is over hours? Mixed traffic against one server, and plain vLLM beside it.

1 to 128 clients send chat and completions, long and short prompts, to the model and to an adapter; some leave in the
middle of a stream. After each round of levels the throughput is compared with plain `vllm serve` of the aligned
checkpoint: the same load for the one and for the other, in turn, who begins changes. Errors are counted by kind, the
memory of each process is sampled, and a line through the rounds' means says whether it grows. In the end the greedy
answers must be those of the beginning, and SIGTERM must end all with code 0.

    python -m loadtests.chaos.soak --minutes 120
    python -m loadtests.chaos.soak --minutes 30 --control    the same traffic against plain vLLM alone: how it grows

Exits 1 if a request failed, an answer changed, or the end was not clean.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from loadtests.chaos.drift import Sampler
from loadtests.chaos.faults import PORTS, Port
from loadtests.chaos.outcomes import Answer, Outcome
from loadtests.chaos.soak_report import as_figures, memory, memory_table, summary
from loadtests.chaos.streams import Streams
from loadtests.chaos.surroundings import MODELS, place_for
from loadtests.chaos.traffic import LEVELS, compared, mixed
from loadtests.chaos.victim import MODEL, Look, Remains, Victim, role_of
from loadtests.chaos.watch import Watch
from loadtests.results import RESULTS, WORK, save, turns
from loadtests.servers import ended
from tests.server import Server

ADAPTER = "adapter"
_ADAPTER_FOLDER = Path(__file__).parents[2] / "deploy/demo/adapter"
# One slot more than there are adapters: with all slots taken, vLLM on CPU computes some requests with the last adapter.
_ADAPTER_FLAGS = [
    "--enable-lora",
    "--max-loras",
    "2",
    "--max-lora-rank",
    "16",
    "--lora-modules",
    f"{ADAPTER}={_ADAPTER_FOLDER}",
    "--num-gpu-blocks-override",
    "128",  # blocks of 128 tokens: a slow machine fills them within minutes
]
_FLAGS = ["--engine-timeout", "120", *_ADAPTER_FLAGS]
_PLAIN_FLAGS = ["--max-model-len", "1024", "--enforce-eager", "--served-model-name", MODEL, *_ADAPTER_FLAGS]
_PLAIN = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODELS / "aligned")]
_LONGEST_LEVEL, _COMPARED_SECONDS = 30.0, 20.0
_END_SECONDS, _READY_SECONDS = 60.0, 480.0
_CACHE_INFO, _FILLING_TOKENS, _TOKENS = "vllm:cache_config_info", 1000, range(1000, 40_000)
_LEAST_MINUTES_FOR_GROWTH = 30
"""A shorter soak says nothing about growth."""
_PATIENCE_SECONDS = 900.0
"""A slow machine has minutes of work in the queue with 128 clients: that shows in the latencies, not as an error."""


@dataclass
class Round:
    """One time through all levels, and the comparison after it; times are CLOCK_MONOTONIC in seconds."""

    began: float
    ended: float = 0.0
    compared: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass
class Soak:
    """What came of a soak."""

    seconds: float
    rounds: list[Round]
    answers: list[Answer]
    samplers: dict[str, Sampler]
    looks: dict[Port, list[Look]]
    changed: int
    compared: int
    code: int
    remains: Remains
    state: dict[str, Any]


def soak(minutes: float, seed: int, work: Path) -> Soak:
    """Start both servers, load the one for so long, compare it with the other, and end it."""
    with ExitStack() as stack:
        victim = Victim(stack.enter_context(place_for(frozenset(), work / "expo")), 1, *_FLAGS)
        stack.callback(victim.kill_all)
        # First, so that what it has in shared memory is not taken for something that the other left behind.
        plain = stack.enter_context(ended(Server(_PLAIN_FLAGS, work / "plain.log", command=_PLAIN)))
        plain.wait_ready(_READY_SECONDS)
        victim.start()
        victim.wait_ready(_READY_SECONDS)
        before = victim.answers()
        if minutes >= _LEAST_MINUTES_FOR_GROWTH:
            for server in (victim, plain):
                _fill_cache(server)
        samplers = {
            "expo": stack.enter_context(Sampler(victim.roles)),
            "plain": stack.enter_context(Sampler(lambda: _roles(plain))),
        }
        began = time.monotonic()
        with (
            Watch(victim) as watch,
            Streams(victim.url, mixed([MODEL, ADAPTER]), seed, _PATIENCE_SECONDS) as streams,
        ):
            rounds = _rounds(minutes, seed, streams, victim, plain)
        over = time.monotonic()
        looks = {port: watch.looks(port, began, over) for port in PORTS}
        state, after = victim.state(), victim.answers()
        code = victim.stop(timeout=_END_SECONDS)
        differing = sum(one != other for one, other in zip(before, after, strict=True))
        return Soak(
            over - began,
            rounds,
            streams.answers,
            samplers,
            looks,
            differing,
            len(before),
            code,
            victim.remains(),
            state,
        )


def control(minutes: float, seed: int, work: Path) -> dict[str, Any]:
    """Load plain vLLM alone, with the same traffic: what its processes hold is what vLLM makes them hold."""
    with ended(Server(_PLAIN_FLAGS, work / "plain.log", command=_PLAIN)) as plain:
        plain.wait_ready(_READY_SECONDS)
        _fill_cache(plain)
        began = time.monotonic()
        with (
            Sampler(lambda: _roles(plain)) as sampler,
            Streams(plain.url, mixed([MODEL, ADAPTER]), seed, _PATIENCE_SECONDS) as streams,
        ):
            blocks: list[tuple[float, float]] = []
            while time.monotonic() < began + minutes * 60:
                blocks.append((_levels(minutes, streams), time.monotonic()))
                print(f"{time.strftime('%H:%M:%S')} round {len(blocks)}: {len(streams.answers)} requests", flush=True)
            streams.pause()
        return {
            "minutes": round((time.monotonic() - began) / 60, 1),
            "rounds": len(blocks),
            "requests": len(streams.answers),
            "memory": {"plain": memory(sampler, blocks)},
        }


def _fill_cache(server: Server) -> None:
    """Use each block of the KV cache once: a block's memory is resident from its first use on, which is no growth."""
    families = text_string_to_metric_families(server.get("/metrics").text)
    info = next(sample.labels for one in families for sample in one.samples if sample.name == _CACHE_INFO)
    left, chance = int(info["num_gpu_blocks"]) * int(info["block_size"]), random.Random(0)
    while left > 0:
        prompt = chance.choices(_TOKENS, k=_FILLING_TOKENS)
        server.post("/v1/completions", {"model": MODEL, "prompt": prompt, "max_tokens": 1}).raise_for_status()
        left -= len(prompt)


def _rounds(minutes: float, seed: int, streams: Streams, victim: Victim, plain: Server) -> list[Round]:
    """Go through the levels again and again; the last round ends when the time is over, or soon after."""
    deadline = time.monotonic() + minutes * 60
    rounds: list[Round] = []
    while time.monotonic() < deadline:
        rounds.append(one := Round(_levels(minutes, streams), time.monotonic()))
        if not streams.pause():
            raise RuntimeError("a client has waited for its answer for too long")
        servers = {"expo": victim, "plain": plain}
        for name in turns(list(servers), len(rounds))[-len(servers) :]:
            idle = next(server for other, server in servers.items() if other != name)
            one.compared[name] = _measure(servers[name], idle, seed + len(rounds))
        print(f"{time.strftime('%H:%M:%S')} round {len(rounds)}: {_told(streams, one)}", flush=True)
    return rounds


def _levels(minutes: float, streams: Streams) -> float:
    """Go through all numbers of clients; returns when that began."""
    began, seconds = time.monotonic(), min(_LONGEST_LEVEL, minutes * 60 / len(LEVELS) / 4)
    for level in LEVELS:
        streams.go_on(level)
        time.sleep(seconds)
    return began


def _measure(server: Server, idle: Server, seed: int) -> dict[str, float]:
    """Load one server for some seconds; the other one has nothing to do."""
    before, began = _cpu_seconds(idle), time.monotonic()
    with Streams(server.url, compared(MODEL), seed, _PATIENCE_SECONDS) as streams:
        streams.go_on()
        time.sleep(_COMPARED_SECONDS)
        streams.pause()
    if failed := [answer for answer in streams.answers if answer.outcome is not Outcome.COMPLETE]:
        raise RuntimeError(f"{len(failed)} requests of a comparison failed: {failed[0].outcome}, {failed[0].detail}")
    last = max(answer.ended for answer in streams.answers)
    first_tokens = sorted(answer.first_token - answer.began for answer in streams.answers if answer.first_token)
    per_token = sorted(answer.seconds_per_token or 0.0 for answer in streams.answers)
    return {
        "tokens_per_second": sum(answer.tokens or 0 for answer in streams.answers) / (last - began),
        "median_first_token_seconds": first_tokens[len(first_tokens) // 2],
        "median_seconds_per_token": per_token[len(per_token) // 2],
        "busy_cores_of_the_idle_server": (_cpu_seconds(idle) - before) / (time.monotonic() - began),
    }


def _cpu_seconds(server: Server) -> float:
    times = [process.cpu_times() for process in server.family()]
    return sum(one.user + one.system for one in times)


def _roles(plain: Server) -> dict[str, psutil.Process]:
    return {role_of(process, plain.process.pid): process for process in plain.family()}


def _told(streams: Streams, one: Round) -> str:
    bad = sum(answer.outcome not in (Outcome.COMPLETE, Outcome.LEFT) for answer in streams.answers)
    ratio = one.compared["expo"]["tokens_per_second"] / one.compared["plain"]["tokens_per_second"]
    return f"{len(streams.answers)} requests, {bad} failed; throughput {ratio:.3f} of plain"


def main() -> int:
    """Soak, print the summary, keep the figures; returns 1 if something was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5, help="how long (default 5)")
    parser.add_argument("--seed", type=int, default=1, help="of the requests (default 1)")
    parser.add_argument("--control", action="store_true", help="load plain vLLM alone, and show its memory")
    parser.add_argument("--key", default="demo", help="under which the figures are kept (default demo)")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for what servers write")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # no server stays behind
    work = options.work.absolute() / f"soak-{os.getpid()}"
    work.mkdir(parents=True)
    if options.control:
        figures = {**control(options.minutes, options.seed, work), "broken": []}
        save("soak", f"{options.key}-control", figures, options.results)
        print(memory_table(figures))
    else:
        figures = as_figures(soak(options.minutes, options.seed, work), options.seed)
        save("soak", options.key, figures, options.results)
        print(summary(figures))
    if figures["broken"]:
        print(f"\nThe logs: {work}")
        return 1
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
