"""What alpha does: effective alpha, and whether two checkpoints are a pair."""
