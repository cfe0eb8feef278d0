"""A process that computes is told from one that hangs, also where it gets little of its core."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from expo_serve.state.shared import SharedState
from expo_serve.vllm_plugin.computing import Computing

pytestmark = pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this kernel does not count")
BURN = "while True: pass"
WAIT = "import time; time.sleep(60)"
SECONDS = 1.0


@pytest.fixture
def state() -> Iterator[SharedState]:
    """A command's shared memory."""
    state = SharedState.create()
    yield state
    state.close()


@pytest.fixture
def rank(state: SharedState) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts processes that count as ranks, all on one core; by default they have never answered."""
    processes: list[subprocess.Popen[bytes]] = []
    core = max(os.sched_getaffinity(0))

    def start(code: str, *, nice: int = 0, alive: float = 0.0) -> subprocess.Popen[bytes]:
        before = f"import os; os.sched_setaffinity(0, {{{core}}}); os.nice({nice}); print(flush=True)\n"
        process = subprocess.Popen([sys.executable, "-c", before + code], stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        state.reporter("rank", engine=0, rank=len(processes)).update(pid=process.pid, alive=alive)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def seen(computing: Computing) -> bool:
    """What the second of two looks says."""
    asked = time.monotonic()
    computing.look(asked)
    time.sleep(SECONDS)
    return computing.look(asked)


def test_nobody(state: SharedState) -> None:
    assert not seen(Computing(state))


def test_rank_that_computes(state: SharedState, rank: Callable[..., subprocess.Popen[bytes]]) -> None:
    rank(BURN)
    assert seen(Computing(state))


def test_rank_that_gets_next_to_nothing_of_its_core(
    state: SharedState, rank: Callable[..., subprocess.Popen[bytes]]
) -> None:
    rank(BURN, alive=time.monotonic() + 3600)  # it owes no answer, and takes what there is
    rank(BURN, nice=19)
    assert seen(Computing(state))


@pytest.mark.parametrize("code", [WAIT, f"import threading; threading.Thread(target=lambda: exec({BURN!r})).start()"])
def test_rank_that_waits(state: SharedState, rank: Callable[..., subprocess.Popen[bytes]], code: str) -> None:
    rank(code)
    assert not seen(Computing(state))


def test_rank_that_is_stopped(state: SharedState, rank: Callable[..., subprocess.Popen[bytes]]) -> None:
    rank(BURN).send_signal(signal.SIGSTOP)
    assert not seen(Computing(state))


def test_one_of_several_that_is_stopped(state: SharedState, rank: Callable[..., subprocess.Popen[bytes]]) -> None:
    rank(BURN)
    rank(BURN).send_signal(signal.SIGSTOP)
    assert not seen(Computing(state))


def test_rank_that_is_gone_counts_no_more(state: SharedState, rank: Callable[..., subprocess.Popen[bytes]]) -> None:
    rank(BURN)
    gone = rank(BURN)
    gone.kill()
    gone.wait()
    assert seen(Computing(state))
