"""On a clock of its own: reading, copying and combining go on at the same time, whatever the size of the tensors."""

from __future__ import annotations

import pytest

from loadtests.device_model.clock import Rates
from loadtests.device_model.pipeline import PAIR, load
from loadtests.device_model.workloads import alike

# Nothing but the three: what Python takes depends on the model, and is counted in loadtests/results/device_model.json.
PIPELINE = {"tensor_seconds": 0.0, "copy_call_seconds": 0.0, "call_seconds": 0.0}
MACHINES = {
    "one reader too few": Rates(readers=6, reader_bytes=7e9, **PIPELINE),
    "a slow link": Rates(readers=8, reader_bytes=7e9, link_bytes=25e9, **PIPELINE),
    "slow memory": Rates(readers=16, reader_bytes=7e9, memory_bytes=0.1e12, **PIPELINE),
    "a disk": Rates(readers=8, reader_bytes=7e9, storage_bytes=6e9, **PIPELINE),
    "a network": Rates(readers=8, reader_bytes=7e9, storage_bytes=2e9, request_seconds=2e-3, **PIPELINE),
}


@pytest.mark.parametrize("rates", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize(("size", "count", "layers", "least"), [(8 << 20, 9, 40, 0.9), (400_000, 300, 20, 0.7)])
def test_the_slowest_of_the_three_is_busy(rates: Rates, size: int, count: int, layers: int, least: float) -> None:
    assert load(list(alike(count, size, layers)), PAIR, rates).share >= least


def test_without_reading_ahead_it_would_not_be() -> None:
    workload = list(alike(300, 400_000, 20))
    rates = MACHINES["one reader too few"]
    assert load(workload, PAIR, rates, turns=2).share < 0.7
