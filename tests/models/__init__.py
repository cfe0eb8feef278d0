"""Tiny checkpoints for the tests, and the independent reference for what extrapolating them gives."""

from tests.models.build import FAMILIES, build_pair, write_checkpoint
from tests.models.reference import read_tensors, reference_checkpoint, reference_tensors

__all__ = [
    "FAMILIES",
    "build_pair",
    "read_tensors",
    "reference_checkpoint",
    "reference_tensors",
    "write_checkpoint",
]
