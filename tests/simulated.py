"""Loads of vLLM onto a simulated device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest
from vllm import _custom_ops

from expo_serve.vllm_plugin import loader, processing
from tests.load.simulator import Simulator

UNSEEN: tuple[tuple[object, str], ...] = ((processing, "unwatched"), (_custom_ops, "create_onednn_mm"))
"""Where operations of the model begin that no dispatch mode sees: a device does them in their order all the same."""


@contextmanager
def onto(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let models be loaded onto a simulated device, whose stream their own operations are on.

    Args:
        simulator: the device.
        monkeypatch: lets go of it in the end.
    """
    small: dict[str, Any] = {"threads": 2, "stage_bytes": 1 << 14, "turns": 4}

    def in_order(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def after_the_rest(*arguments: Any) -> Any:
            simulator.model_goes_on()
            return function(*arguments)

        return after_the_rest

    with monkeypatch.context() as patch, simulator.model():
        patch.setattr(loader, "stages_for", lambda *_: simulator.stages(**small))
        for owner, name in UNSEEN:
            patch.setattr(owner, name, in_order(getattr(owner, name)))
        yield
