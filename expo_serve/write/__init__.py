"""Checkpoints and packed deltas written to disk, and packed deltas verified."""
