"""The way of a weight is the one that docs/architecture.md tells, step by step."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import expo_serve
from expo_serve import kernels
from expo_serve.kernels import reading
from expo_serve.load import sizes
from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.session import load_into
from expo_serve.load.threads import DaemonPool
from tests.load.lazies import NAME, Lazies, numbers

PACKAGE = Path(expo_serve.__file__).parent
PAGE = PACKAGE.parent / "docs/architecture.md"
MOST_STEPS, MOST_FILES = 9, 6
_STEP = re.compile(r"^\d+\. `expo_serve/(load/[\w/]+\.py|kernels/[\w/]+\.py)`: `([\w.]+)`", re.MULTILINE)


def told() -> list[tuple[str, str]]:
    """The numbered steps of the page: file within the package, and function."""
    return _STEP.findall(PAGE.read_text())


def frames(frame: FrameType | None) -> list[tuple[str, str]]:
    """The package's own functions on a stack, outermost first."""

    def upward(frame: FrameType | None) -> Iterator[tuple[str, str]]:
        while frame:
            file = Path(frame.f_code.co_filename)
            if file.is_relative_to(PACKAGE):
                yield str(file.relative_to(PACKAGE)), frame.f_code.co_qualname
            frame = frame.f_back

    return list(upward(frame))[::-1]


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str]]:
    """The functions through which a bf16 copy goes from ``copy_`` to the compiled loop, over both threads."""
    steps: list[list[tuple[str, str]]] = []
    submit, stream = DaemonPool.submit, reading.stream

    def watched_submit(pool: DaemonPool, task: Any) -> None:
        steps.append(frames(sys._getframe(1)))
        submit(pool, task)

    def watched_stream(*arguments: Any) -> Any:
        steps.append([*frames(sys._getframe(1)), ("kernels/reading.py", "stream")])
        return stream(*arguments)

    monkeypatch.setattr(DaemonPool, "submit", watched_submit)
    assert kernels.available("bf16.combine", "reading.stream")
    monkeypatch.setattr(sizes, "JOINED_BYTES", 1)
    monkeypatch.setattr(reading, "stream", watched_stream)
    plan = Lazies(tmp_path).plan({NAME: numbers(64, 32)}, {NAME: numbers(64, 32, seed=1)})
    model = torch.nn.Linear(32, 64, bias=False, dtype=torch.bfloat16)
    with load_into(model, threads=2) as session:
        model.weight.data.copy_(lazy_tensor(plan.tensors[NAME], session))
        session.settle()
    return [step for part in steps for step in part]


def test_way_is_the_one_that_is_told(walked: list[tuple[str, str]]) -> None:
    assert walked == told()


def test_way_is_short(walked: list[tuple[str, str]]) -> None:
    assert 0 < len(walked) <= MOST_STEPS
    assert len({file for file, _ in walked}) <= MOST_FILES
