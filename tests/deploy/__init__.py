"""Tests of what is deployed: chart, image, rules. Their tools lie in ``.deploy`` (tests/deploy/install.py)."""
