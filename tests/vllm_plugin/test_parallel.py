"""Several engines, ranks and API servers: one report of every rank, one page of metrics, one end for all."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from expo_serve.report import DeploymentReport
from tests.server import Server
from tests.vllm_plugin.trees import assert_all_gone, assert_nothing_new, last_line, shared_memory

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture
def running(request: pytest.FixtureRequest, tiny_pair: tuple[Path, Path], tmp_path: Path) -> Iterator[Server]:
    """The tiny pair served with the flags of the test's parameter; nothing may be left of it."""
    segments = shared_memory()
    base, aligned = tiny_pair
    arguments = ["--base", str(base), "--aligned", str(aligned), "--alpha", "-0.25", "--enforce-eager"]
    arguments += ["--max-model-len", "64", *request.param]
    server = Server(arguments, tmp_path / "log", VLLM_CPU_OMP_THREADS_BIND="0|1")
    try:
        yield server.wait_ready()
    finally:
        server.process.kill()
        server.process.wait()
    assert_nothing_new(segments)


def labelled(server: Server, name: str) -> dict[tuple[str, str], float]:
    """A gauge's samples by engine and rank."""
    return {
        (sample.labels["engine"], sample.labels["rank"]): sample.value
        for family in text_string_to_metric_families(server.get("/metrics").text)
        for sample in family.samples
        if sample.name == name
    }


def complete(server: Server) -> int:
    body = {"model": "aligned-expo--0.25", "prompt": "One, two,", "max_tokens": 2}
    return server.post("/v1/completions", body).status_code


@pytest.mark.parametrize("running", [["--tensor-parallel-size", "2", "--api-server-count", "2"]], indirect=True)
def test_two_ranks_behind_two_api_servers_then_kill(running: Server) -> None:
    # Asked often enough that both API servers answer.
    bodies = {running.get("/v1/expo").json()["ranks"][0]["total_seconds"] for _ in range(8)}
    assert len(bodies) == 1
    report = DeploymentReport.model_validate_json(running.get("/v1/expo").text)
    assert [(rank.engine, rank.rank) for rank in report.ranks] == [(0, 0), (0, 1)]
    expected = {("0", str(rank.rank)): rank.total_seconds for rank in report.ranks}
    assert labelled(running, "expo_load_total_duration_seconds") == expected
    assert complete(running) == 200
    family = running.family()
    running.process.send_signal(signal.SIGKILL)
    assert_all_gone(family)


@pytest.mark.parametrize("running", [["--data-parallel-size", "2"]], indirect=True)
def test_two_engines_then_one_dies(running: Server) -> None:
    report = DeploymentReport.model_validate_json(running.get("/v1/expo").text)
    assert [(rank.engine, rank.rank) for rank in report.ranks] == [(0, 0), (1, 0)]
    expected = {(str(rank.engine), "0"): rank.total_seconds for rank in report.ranks}
    assert labelled(running, "expo_load_total_duration_seconds") == expected
    assert complete(running) == 200
    family = running.family()
    _worker_of(family).kill()
    started = time.monotonic()
    assert running.process.wait(40) == 1
    assert time.monotonic() - started < 30
    assert_all_gone(family)
    assert last_line(running).startswith("expo-serve: error: ")


def _worker_of(family: list[psutil.Process]) -> psutil.Process:
    return next(process for process in family if process.cmdline()[0].startswith("VLLM::Worker"))
