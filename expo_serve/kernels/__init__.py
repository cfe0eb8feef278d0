"""Compiled loops: arrays and file descriptors in, flags out. Imports nothing of the package."""
