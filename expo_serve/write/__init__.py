"""Writes merged checkpoints and packed deltas, and verifies packed deltas."""
