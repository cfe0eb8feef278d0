"""Draws what ``inspect --measure`` found, over the layers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from expo_serve.cli.inspection import Inspection
from expo_serve.config import format_alpha
from expo_serve.errors import ExpoError


def draw(inspection: Inspection, file: str) -> None:
    """Draw the size of the step and the effective alpha of each layer.

    Args:
        inspection: with its measurement.
        file: the PNG file to write; an existing one is replaced.

    Raises:
        ExpoError: the file cannot be written.
    """
    assert inspection.measurement is not None
    # Optional, and without stubs that mypy could read where it is not installed.
    figures: Any = import_module("matplotlib.figure")
    layers = inspection.measurement.layers
    numbers = [layer.layer for layer in layers]
    figure = figures.Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(numbers, [100 * (layer.step or 0) for layer in layers], marker="o")
    above.set_ylabel("||aligned - base|| / ||aligned||, %")
    above.set_title(" and ".join(source.name for source in inspection.sources.values()))
    for method in inspection.measurement.effective_alpha:
        below.plot(numbers, [layer.effective_alpha[method] for layer in layers], marker="o", label=method)
    below.axhline(inspection.alpha, color="grey", linestyle=":", label=f"alpha {format_alpha(inspection.alpha)}")
    below.set_ylabel("effective alpha")
    below.set_xlabel("layer")
    below.legend()
    try:
        figure.savefig(file, dpi=120)
    except OSError as error:
        raise ExpoError(f"--plot: {file} cannot be written: {error.strerror}") from None
