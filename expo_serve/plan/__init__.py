"""What becomes of each tensor, decided from headers alone: pairs, deltas, every refusal."""
