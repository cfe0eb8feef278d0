"""The soak: whether growth is told from noise, its percentiles; and some minutes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loadtests.chaos.drift import Sample, drift, slope_and_p
from loadtests.chaos.outcomes import Answer, Outcome
from loadtests.chaos.soak_report import latency
from tests.loadtest_runs import run_for_minutes


def test_growth_is_told_from_noise() -> None:
    noise = np.random.default_rng(1)
    times = np.arange(12) / 6
    slope, p = slope_and_p(times, 100 + 30 * times + noise.normal(0, 2, 12), seed=0)
    assert slope == pytest.approx(30, abs=5)
    assert p < 0.001
    assert slope_and_p(times, 100 + noise.normal(0, 2, 12), seed=0)[1] > 0.05
    assert slope_and_p(times, np.full(12, 100.0), seed=0) == (0.0, 1.0)


def test_drift_by_blocks() -> None:
    blocks = [(hour * 3600.0, hour * 3600.0 + 1800) for hour in range(8)]
    samples = [
        Sample(begin + 60 * k, (100 + 2 * hour + k % 2) << 20, 9, 3)
        for hour, (begin, _) in enumerate(blocks)
        for k in range(20)
    ]
    found = drift(samples, blocks)
    assert found is not None
    assert found["mib_per_hour"] == pytest.approx(2, abs=1e-3)
    assert found["is_significant"]
    assert (found["mib_first"], found["mib_last"], found["open_files"]) == (100.5, 114.5, [9, 9])
    assert drift(samples, blocks[:5]) is None


def test_latency_by_the_number_of_clients() -> None:
    answers = [Answer(0, 2 + k, Outcome.COMPLETE, first_token=1, tokens=11, clients=4) for k in range(3)]
    found = latency([*answers, Answer(0, 99, Outcome.LEFT, clients=4), Answer(0, 1, Outcome.COMPLETE, clients=1)])
    assert found["4"] == {
        "requests": 3,
        "first_token": {"p50": 1.0, "p90": 1.0, "p99": 1.0},
        "per_token": {"p50": 0.2, "p90": 0.28, "p99": 0.298},
        "whole": {"p50": 3.0, "p90": 3.8, "p99": 3.98},
    }
    assert found["1"]["requests"] == 1


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("demo_pair")
def test_soak_for_some_minutes(tmp_path: Path) -> None:
    figures = run_for_minutes("loadtests.chaos.soak", "soak", tmp_path, "--minutes", "3")
    assert figures["requests"] > 50
    assert figures["errors"]["count"] == 0
