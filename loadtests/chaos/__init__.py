"""Faults on purpose against a real server under load (``python -m loadtests.chaos``), and a soak (``.soak``)."""
