"""Escape codes of the sparse coding of packed deltas."""

from __future__ import annotations

SKIP = 255
"""In the gaps: skip 255 values, and continue with the next byte."""
LARGE = 255
"""In the small steps: the step does not fit in a byte and is stored among the large ones."""
