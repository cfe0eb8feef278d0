"""A model loaded by plain vLLM and by our loader, in this process, and its bits compared."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from expo_serve.report import LoadReport
from tests.inprocess import state_of, vllm_model

State = dict[str, torch.Tensor]
"""Raw bytes of every parameter and buffer by name, as loaded and as processed afterwards."""


def by_expo(base: Path, alpha: float, **more: Any) -> dict[str, Any]:
    """The arguments that make vLLM extrapolate from a base; the model is the aligned side.

    Args:
        base: the folder.
        alpha: how far.
        more: further keys of the loader's extra config.
    """
    return with_extra({"base": str(base), "alpha": alpha, **more})


def with_extra(extra: dict[str, Any]) -> dict[str, Any]:
    """The arguments of our load format with this extra config."""
    return {"load_format": "expo", "model_loader_extra_config": extra}


def load(model: Path, **arguments: Any) -> tuple[State, LoadReport | None]:
    """A model's state, and our report where our loader filled it.

    Args:
        model: the checkpoint.
        arguments: as for :func:`tests.inprocess.vllm_model`.
    """
    with vllm_model(model, **arguments) as loaded:
        report: Any = getattr(loaded, "expo_load_report", None)
        return state_of(loaded), report


def differing(found: State, expected: State, unfilled: Collection[str] = ()) -> list[str]:
    """Names whose bits differ.

    Args:
        found: our state.
        expected: plain vLLM's, with the same names. Tensors on meta, left out of a model, have no bits.
        unfilled: parameters that vLLM itself leaves without values.
    """
    assert found.keys() == expected.keys()
    return [
        name
        for name, tensor in expected.items()
        if name.removesuffix(" (processed)") not in unfilled
        and not (tensor.is_meta or torch.equal(found[name], tensor))
    ]


def load_both(merged: Path, model: Path, ours: dict[str, Any], **arguments: Any) -> tuple[list[str], LoadReport]:
    """Load plainly and ours.

    Args:
        merged: the checkpoint that plain vLLM loads.
        model: the checkpoint that ours is told.
        ours: the arguments of our load, as :func:`by_expo` gives them.
        arguments: of both loads.

    Returns:
        The names whose bits differ, and our report.
    """
    expected, none = load(merged, **arguments)
    found, report = load(model, **ours, **arguments)
    assert none is None
    assert report is not None
    return differing(found, expected), report


def assert_same_bits(merged: Path, model: Path, ours: dict[str, Any], **arguments: Any) -> LoadReport:
    """Load both ways, as :func:`load_both` does; no bit may differ. Returns our report."""
    names, report = load_both(merged, model, ours, **arguments)
    assert names == []
    return report


def assert_not_loaded(model: Path, ours: dict[str, Any], match: str, **arguments: Any) -> None:
    """Our load ends with an error whose text matches."""
    with pytest.raises(Exception, match=match), vllm_model(model, **ours, **arguments):
        pass
