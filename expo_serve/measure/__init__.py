"""What alpha does: how much of the step arrives after rounding, and whether two checkpoints are a pair for ExPO."""
