"""Checkpoints on disk: sources, safetensors headers, records of tensors. Imports no torch and knows no alpha."""
