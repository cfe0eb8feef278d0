"""Fixtures of the tests that load models with vLLM's own code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(params=["host", pytest.param("device", marks=pytest.mark.slow)])
def destination(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a test twice: models are loaded into the host's memory, and onto a simulated device."""
    if request.param == "host":
        yield
        return
    from tests.load.simulator import Simulator  # these import torch and vLLM, which not every test here needs
    from tests.simulated import onto

    with onto(Simulator(seed=5), monkeypatch):
        yield
